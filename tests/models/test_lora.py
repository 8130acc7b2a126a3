"""Adapters: they start as nothing, alone carry gradients, and merge into the same function."""

import dataclasses
import functools
import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from sdjax.models import decoder, hf, lora, peft
from sdjax.models.config import LoraConfig, ModelConfig
from sdjax.parallel import make_mesh

PLAIN = ModelConfig.from_hf(families.CASES["qwen3-tied"])
CFG = dataclasses.replace(PLAIN, lora=LoraConfig(rank=2, alpha=6.0))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 90, (2, 10)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(10), (2, 10))


@functools.partial(jax.jit, static_argnums=1)
def hidden(params, cfg, dropout_key=None):
    return decoder.hidden_states(
        params, TOKENS, jnp.ones_like(TOKENS), POSITIONS, cfg, dropout_key=dropout_key
    )


@functools.cache
def plain_params():
    return families.random_params(PLAIN)


def fresh(cfg):
    """Parameters with adapters that do nothing yet."""
    return lora.add(plain_params(), cfg, jax.random.key(1))


def trained():
    """Parameters whose B is no longer 0."""
    adapters, frozen = lora.split(fresh(CFG))
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), adapters)
    return lora.join(adapters, frozen)


def test_fresh_adapters_change_nothing():
    np.testing.assert_array_equal(hidden(fresh(CFG), CFG), hidden(plain_params(), PLAIN))


def test_merged_is_the_same_function():
    """On all seven projections; scale, order of axes and layer all matter."""
    params = trained()
    assert jnp.abs(hidden(params, CFG) - hidden(lora.split(params)[1], PLAIN)).max() > 0.1
    merged = lora.merge(params, CFG)
    assert jax.tree.structure(merged) == jax.tree.structure(plain_params())
    np.testing.assert_allclose(hidden(merged, PLAIN), hidden(params, CFG), atol=2e-5)


def test_only_adapters_get_gradients():
    """B learns at once, A only after B has moved."""
    adapters, frozen = lora.split(fresh(CFG))
    grads = jax.grad(lambda a: jnp.sum(jnp.sin(hidden(lora.join(a, frozen), CFG))))(adapters)
    assert set(grads) == {f"w_{t}" for t in CFG.lora.targets}
    for grad in grads.values():
        assert jnp.abs(grad["b"]).max() > 0 and jnp.abs(grad["a"]).max() == 0


def test_targets_choose_the_projections():
    cfg = dataclasses.replace(PLAIN, lora=LoraConfig(rank=3, alpha=3.0, targets=("q", "o")))
    adapters, _ = lora.split(fresh(cfg))
    L, D, H, C = PLAIN.n_layers, PLAIN.d_model, PLAIN.n_heads, PLAIN.head_dim
    assert jax.tree.map(jnp.shape, adapters) == {
        "w_q": {"a": (L, D, 3), "b": (L, 3, H, C)},
        "w_o": {"a": (L, H, C, 3), "b": (L, 3, D)},
    }


def test_dropout_needs_a_key_and_keeps_the_mean():
    """Without a key (sampling, scoring, teacher) nothing is dropped; with one the mean stays."""
    cfg = dataclasses.replace(CFG, lora=LoraConfig(rank=2, alpha=0.6, dropout=0.5, targets=("v",)))
    params = trained()
    layers = dict(params["layers"], lora={"w_v": params["layers"]["lora"]["w_v"]})
    params = {**params, "layers": layers}
    exact = hidden(params, cfg)
    draws = jnp.stack([hidden(params, cfg, jax.random.key(i)) for i in range(200)])
    assert jnp.abs(draws[0] - exact).max() > 1e-3
    assert jnp.abs(draws.mean(0) - exact).mean() < 0.2 * jnp.abs(draws - exact).mean()


def test_adapters_are_sharded_like_their_matrices():
    mesh = make_mesh(fsdp=4, tensor=2)
    adapters, _ = lora.split(lora.add(plain_params(), CFG, jax.random.key(1), mesh))
    assert adapters["w_q"]["a"].sharding.spec == P(None, "fsdp", None)
    assert adapters["w_q"]["b"].sharding.spec == P(None, None, "tensor", None)


def test_export_merges(tmp_path):
    params = trained()
    hf.save(tmp_path / "out", CFG, params, dtype="float32")
    cfg, merged = hf.load(tmp_path / "out")
    np.testing.assert_allclose(hidden(merged, cfg), hidden(params, CFG), atol=2e-5)


def test_peft_files_hold_the_same_product(tmp_path):
    """W + alpha / r B A with PEFT's names and [out, in] layouts gives the merged weight."""
    params = trained()
    hf.save(tmp_path / "base", PLAIN, lora.split(params)[1], dtype="float32")
    hf.save(tmp_path / "merged", CFG, params, dtype="float32")
    peft.save_adapters(tmp_path / "adapters", CFG, params, "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapters = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    assert len(adapters) == 2 * 7 * PLAIN.n_layers
    assert {name.split(".")[-3] for name in adapters} == set(config["target_modules"])
    for name in adapters:
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
            product = adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
            np.testing.assert_allclose(base[weight] + scale * product, merged[weight], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "base", "merged"]
    with pytest.raises(ValueError, match="model.lora.rank is 0"):
        peft.save_adapters(tmp_path / "none", PLAIN, lora.split(params)[1], "base")
