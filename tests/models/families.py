"""Small random checkpoints of every family in odd shapes, the same on every machine.

Weights come from numpy, seeded by the tensor's name, so that the golden logits need no weights
beside them. Norm weights and biases are random too: at their usual 1 and 0 a dropped one would go
unnoticed.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sdjax.models import decoder, hf
from sdjax.models.config import ModelConfig

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}


def _case(model_type, **changes):
    return {"model_type": model_type, **BASE, **changes}


# Window 5 is shorter than every test sequence; 7 query heads per key head are no power of two.
CASES = {
    "llama-tied": _case("llama", tie_word_embeddings=True, rope_theta=1e4),
    "llama-llama3-gqa7": _case(
        "llama",
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=6,
        hidden_size=42,
        rope_theta=5e5,
        rope_scaling=LLAMA3,
    ),
    "llama-linear-bias": _case(
        "llama",
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=4,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "qwen2": _case("qwen2", rope_theta=1e6, use_sliding_window=False, sliding_window=5),
    "qwen2-tied-window": _case(
        "qwen2",
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        num_key_value_heads=1,
    ),
    "qwen3-tied": _case("qwen3", head_dim=12, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3-gqa7-yarn-window": _case(
        "qwen3",
        num_attention_heads=14,
        num_key_value_heads=2,
        hidden_size=42,
        head_dim=8,
        attention_bias=True,
        rope_theta=1e6,
        rope_scaling=YARN,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "olmo3": _case(
        "olmo3",
        num_hidden_layers=4,
        sliding_window=5,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "olmo3-yarn-gqa1": _case(
        "olmo3",
        num_hidden_layers=4,
        num_key_value_heads=4,
        sliding_window=5,
        rope_theta=5e5,
        rope_scaling=YARN | {"attention_factor": 1.2},
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
LENGTH = 40
SMOLLM2_PROMPT = "A box holds 12 eggs. How many eggs are in 7 boxes? Explain shortly."


def random_tensor(name, shape, scale=1.0):
    """A tensor that depends on its name alone: norms near 1, matrices that keep the variance."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1.0 + 0.3 * x
    if name.endswith("bias"):
        return 0.5 * x
    return x * np.float32(scale * shape[-1] ** -0.5)


def write_checkpoint(folder, raw):
    """Writes config.json and model.safetensors of a case and returns the tensors by name."""
    cfg = ModelConfig.from_hf(raw)
    tensors = {
        name: random_tensor(name, leaf.stored_shape)
        for leaf in hf.leaves(cfg)
        for name in leaf.names
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return tensors


def token_batch(vocab_size):
    """Three rows [3, LENGTH]: full, right-padded and left-padded, with their masks."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(3, vocab_size, (3, LENGTH)).astype(np.int32)
    mask = np.ones((3, LENGTH), np.int32)
    mask[1, 29:] = 0
    mask[2, :13] = 0
    return np.where(mask > 0, tokens, 0).astype(np.int32), mask


def random_params(cfg):
    """A parameter pytree of `cfg` without the time that compiling a generator takes."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        x = rng.standard_normal(spec.shape).astype(np.float32)
        name = path[-1].key
        if "norm" in name or name.startswith("b_"):
            return jnp.asarray(0.3 * x + float("norm" in name))
        return jnp.asarray(x * np.float32(spec.init))

    return jax.tree_util.tree_map_with_path(draw, decoder.param_specs(cfg), is_leaf=decoder.is_spec)


def sample_of(logits_BTV):
    """The part of the logits that golden/families.npz keeps."""
    return np.asarray(logits_BTV)[:, 3::6, ::4]
