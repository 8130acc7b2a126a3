"""How many slots fit into a device's memory, computed before anything is allocated.

Counts what the engine holds at its largest: weights, cache, one prefill batch, the logits of a
step. Activations of a decode step are small beside these and covered by a reserve.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.models import decoder
from sdjax.models.config import ModelConfig
from sdjax.rollout import cache as kv
from sdjax.rollout.buckets import EngineConfig

log = logging.getLogger(__name__)

RESERVE = 0.1  # of the memory: activations, the compiler's temporaries, fragmentation
LOGIT_COPIES = 3  # logits, their exponentials, and the truncation's candidates


@dataclasses.dataclass(frozen=True)
class SlotPlan:
    """Bytes per device of an engine with `slots` slots over all devices of `data` x `fsdp`."""

    slots: int
    weights: int
    cache: int
    prefill: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.prefill + self.logits

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("cache", self.cache), ("prefill", self.prefill))
        text = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
        return f"{self.slots} slots: {self.total / 2**30:.2f} GiB per device ({text})"


def needs(cfg: ModelConfig, engine: EngineConfig, shards: int = 1, tensor: int = 1) -> SlotPlan:
    """What an engine needs on each device when every slot is at its limit.

    `shards` is data x fsdp, over which the slots are split; `tensor` splits weights and cache.
    """
    compute = jnp.dtype(engine.compute_dtype).itemsize
    specs = jax.tree.leaves(decoder.param_specs(cfg), is_leaf=decoder.is_spec)
    weights = sum(math.prod(spec.shape) for spec in specs) * compute
    spec = kv.CacheSpec.of(cfg, engine.cache_dtype_name)
    buckets = engine.buckets(shards)
    rows, length = engine.slots // shards, buckets.lengths[-1]
    # a prefill batch's activations are about four times its width
    batch = math.prod(buckets.largest_prefill) // shards
    prefill = spec.nbytes(1, batch) + batch * (4 * cfg.d_model + 2 * cfg.d_ff) * compute
    # growing the cache holds one layer twice
    cache = spec.nbytes(rows, length) * (spec.n_layers + 1) // spec.n_layers
    return SlotPlan(
        slots=engine.slots,
        weights=weights // tensor,
        cache=cache // tensor,
        prefill=prefill // tensor,
        logits=LOGIT_COPIES * rows * cfg.vocab_size * 4 // tensor,
    )


def plan_slots(
    cfg: ModelConfig,
    engine: EngineConfig,
    memory: int,
    shards: int = 1,
    tensor: int = 1,
    most: int = 1024,
) -> SlotPlan:
    """The plan with the most slots (up to `most`) that fit into `memory` bytes of each device.

    Slots are a power of two times `shards`, so that they can be halved when the queue runs dry.
    Raises ValueError, with the numbers, when not even one slot per shard fits.
    """
    usable = int(memory * (1 - RESERVE))
    best, slots = None, shards
    while slots <= max(most, shards):
        plan = needs(cfg, dataclasses.replace(engine, slots=slots), shards, tensor)
        if plan.total > usable:
            break
        best, slots = plan, 2 * slots
    if best is None:
        raise ValueError(
            f"{plan} do not fit into the {usable / 2**30:.2f} GiB that may be used of each device: "
            f"a response of {engine.max_prompt_len:,} + {engine.max_new_tokens:,} tokens alone "
            f"needs {plan.cache / 2**30:.2f} GiB of cache. Lower sampling.max_new_tokens, set "
            "rollout.cache_dtype='int8', or raise rollout.tensor"
        )
    return best


def fitted(cfg: ModelConfig, engine: EngineConfig, mesh: Any) -> EngineConfig:
    """`engine` with as many of its slots as fit into the memory of the mesh's devices.

    ValueError, with the numbers, when not even one does. CPUs do not say what they have: there the
    slots stay as they are.
    """
    stats = mesh.devices.flat[0].memory_stats() if mesh.devices.size else None
    limit = (stats or {}).get("bytes_limit")
    if not limit:
        return engine
    shards, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    wanted = needs(cfg, engine, shards, tensor)
    if wanted.total <= limit * (1 - RESERVE):
        return engine
    plan = plan_slots(cfg, engine, limit, shards, tensor, most=engine.slots)
    log.warning("%s do not fit into %.2f GiB: sampling with %s", wanted, limit / 2**30, plan)
    return dataclasses.replace(engine, slots=plan.slots)
