"""Low-rank adapters (https://arxiv.org/abs/2106.09685) as extra leaves of the parameter pytree.

    W' = W + (alpha / rank) A B,    A ~ U(-b, b) with b = 1 / sqrt(inputs),  B = 0

The adapters live in params["layers"]["lora"][leaf]["a" | "b"]; `decoder` applies them. Only they
are trained: `split` separates them from the frozen rest. PEFT's file format is in `peft`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sdjax.models.config import LoraConfig, ModelConfig
from sdjax.models.decoder import ParamSpec, is_spec, param_specs
from sdjax.parallel import sharding
from sdjax.types import Array, Params

N_INPUTS = {"w_o": 2}  # axes after L that the product sums over; 1 for all other matrices


def from_config(c: Any) -> LoraConfig | None:
    """LoraConfig from the config section model.lora; None when rank is 0."""
    if not c.rank:
        return None
    return LoraConfig(c.rank, float(c.alpha), tuple(c.targets), float(c.dropout))


def specs(cfg: ModelConfig) -> dict[str, dict[str, ParamSpec]]:
    """ParamSpecs of the adapters of `cfg.lora`: a [L, inputs..., r], b [L, r, outputs...]."""
    out = {}
    for target in cfg.lora.targets:
        name = "w_" + target
        spec = param_specs(cfg)["layers"][name]
        k = 1 + N_INPUTS.get(name, 1)
        fan_in = 1
        for size in spec.shape[1:k]:
            fan_in *= size
        rank = cfg.lora.rank
        out[name] = {
            "a": ParamSpec(spec.letters[:k] + "1", (*spec.shape[:k], rank), fan_in**-0.5),
            "b": ParamSpec("L1" + spec.letters[k:], (cfg.n_layers, rank, *spec.shape[k:]), "zeros"),
        }
    return out


def add(
    params: Params, cfg: ModelConfig, key: Array, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> Params:
    """The parameters with fresh adapters; they change nothing until B is trained."""
    leaves, tree = jax.tree.flatten(specs(cfg), is_leaf=is_spec)
    sizes = [math.prod(spec.shape) if spec.init != "zeros" else 0 for spec in leaves]

    def draw(key: Array) -> Params:
        # One draw, cut up: the CPU takes long to compile a generator for every shape.
        flat = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
        out, start = [], 0
        for spec, size in zip(leaves, sizes, strict=True):
            value = jnp.zeros(spec.shape)
            if size:
                value = spec.init * flat[start : start + size].reshape(spec.shape)
            out.append(value.astype(dtype))
            start += size
        return tree.unflatten(out)

    place = None
    if mesh is not None:
        place = tree.unflatten([sharding(mesh, spec.letters) for spec in leaves])
    adapters = jax.jit(draw, out_shardings=place)(key)
    return {**params, "layers": {**params["layers"], "lora": adapters}}


def split(params: Params) -> tuple[Params, Params]:
    """(trained, frozen): the adapters, and everything else. Without adapters (params, None)."""
    if "lora" not in params["layers"]:
        return params, None
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "lora"}
    return params["layers"]["lora"], {**params, "layers": layers}


def join(trained: Params, frozen: Params | None) -> Params:
    """The inverse of `split`."""
    if frozen is None:
        return trained
    return {**frozen, "layers": {**frozen["layers"], "lora": trained}}


def merge(params: Params, cfg: ModelConfig) -> Params:
    """Plain parameters W + (alpha / rank) A B; `params` themselves when there are no adapters."""
    adapters, frozen = split(params)
    if frozen is None:
        return params
    layers = dict(frozen["layers"])
    for name, adapter in adapters.items():
        weight = layers[name]
        a, b = adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32)
        k = a.ndim - 1
        product = jax.vmap(lambda x, y, k=k: jnp.tensordot(x, y, axes=1))(a, b)
        layers[name] = (weight + cfg.lora.scale * product).astype(weight.dtype)
    return {**frozen, "layers": layers}


def without(cfg: ModelConfig) -> ModelConfig:
    """The config of the merged model."""
    return dataclasses.replace(cfg, lora=None)
