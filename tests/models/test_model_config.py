"""config.json in and out; every field that would change the mathematics is honoured or refused."""

import dataclasses

import families
import pytest

from sdjax.models import config
from sdjax.models.config import FAMILIES, LoraConfig, ModelConfig
from sdjax.models.rope import Rope

LLAMA = families.CASES["llama-tied"]
QWEN3 = families.CASES["qwen3-tied"]
OLMO3 = families.CASES["olmo3"] | {"rope_parameters": None}
FULL, SLIDING = config.FULL, config.SLIDING
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def published(model_type, vocab, d_model, d_ff, layers, heads, kv_heads, positions, **more):
    """The fields that every config.json of these families has."""
    return {
        "architectures": ["AnyForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": d_model,
        "initializer_range": 0.02,
        "intermediate_size": d_ff,
        "max_position_embeddings": positions,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "vocab_size": vocab,
        **more,
    }


# As published, with the fields that change nothing for us.
QWEN2_MORE = {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}
PUBLISHED = {
    "Qwen3-8B": published(
        *("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960),
        attention_bias=False,
        head_dim=128,
        max_window_layers=36,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": published(
        *("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072),
        max_window_layers=21,
        use_sliding_window=False,
        **QWEN2_MORE,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": published(
        *("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072),
        max_window_layers=28,
        use_sliding_window=False,
        **QWEN2_MORE,
    ),
    "Olmo-3-7B": published(
        *("olmo3", 100278, 4096, 11008, 32, 32, 32, 65536),
        attention_bias=False,
        layer_types=[FULL if i % 4 == 3 else SLIDING for i in range(32)],
        rope_scaling=OLMO3_YARN,
        rope_theta=500000,
        sliding_window=4096,
    ),
    "Olmo-3-7B, saved by transformers 5": published(
        *("olmo3", 100278, 4096, 11008, 32, 32, 32, 65536),
        attention_bias=False,
        layer_types=[FULL if i % 4 == 3 else SLIDING for i in range(32)],
        rope_parameters={
            FULL: OLMO3_YARN | {"rope_theta": 500000},
            SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
        },
        sliding_window=4096,
    ),
    "SmolLM2-135M": published(
        *("llama", 49152, 576, 1536, 30, 9, 3, 8192),
        attention_bias=False,
        is_llama_config=True,
        mlp_bias=False,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    ),
    "Llama-3.1-8B": published(
        *("llama", 128256, 4096, 14336, 32, 32, 8, 131072),
        attention_bias=False,
        eos_token_id=[128001, 128008, 128009],
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=LLAMA31,
        rope_theta=500000.0,
    ),
}


@pytest.mark.parametrize("name", families.CASES)
def test_round_trip(name):
    """What we write, we read back as the same mathematics."""
    cfg = ModelConfig.from_hf(families.CASES[name])
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    assert hash(cfg) == hash(dataclasses.replace(cfg))


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"model_type": "mixtral"}, "model_type='mixtral'"),
        (LLAMA, {"model_type": None}, "model_type=None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"sliding_window": 8}, "sliding_window=8"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        (LLAMA, {"head_dim": 7}, "head_dim=7"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "lack factor"),
        (LLAMA, {"rope_scaling": LLAMA31 | {"low_freq_factor": None}}, "lack low_freq_factor"),
        (LLAMA, {"rope_parameters": {FULL: {"rope_type": "default"}}}, "nested by layer type"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLAMA, {"is_causal": False}, "is_causal=False"),
        (LLAMA, {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        (LLAMA, {"original_max_position_embeddings": 64}, "original_max_position_embeddings=64"),
        (LLAMA, {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        (LLAMA, {"hidden_size": None}, "lacks hidden_size"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "x=1"),
        (LLAMA, {"rope_scaling": families.YARN | {"truncate": False}}, "truncate=false"),
        (QWEN3, {"num_experts": 8}, "num_experts=8"),
        (QWEN3, {"moe_intermediate_size": 8}, "moe_intermediate_size=8"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias=True"),
        (QWEN3, {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        (QWEN3, {"use_mrope": True}, "use_mrope=True"),
        (QWEN3, {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (QWEN3, {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        (OLMO3, {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (OLMO3, {"rope_parameters": {"rope_type": "default", "factor": 1}}, "nested"),
        (OLMO3, {"rope_parameters": {"rope_theta": 1e4}}, "nested"),
        (OLMO3, {"rope_theta": 1e4}, "rope_theta=10000.0 .* sliding layers"),
        (OLMO3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type='yarn'"),
    ],
)
def test_refuses_by_name(base, change, named):
    """Never run wrongly in silence: one sentence that names the field and its value."""
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(base | change)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    """Nothing in them is refused, and what we write is read back as the same mathematics."""
    raw = PUBLISHED[name]
    cfg = ModelConfig.from_hf(raw)
    assert (cfg.n_layers, cfg.n_kv_heads) == (raw["num_hidden_layers"], raw["num_key_value_heads"])
    assert cfg.head_dim == (64 if name.startswith("SmolLM2") else 128)
    assert not any(cfg.windows) or cfg.windows == (4096, 4096, 4096, None) * 8
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg


def test_published_ropes():
    """Both spellings of OLMo-3's; the 7B distillation's theta is not Qwen2.5's million."""
    old, new = (ModelConfig.from_hf(PUBLISHED[n]) for n in PUBLISHED if n.startswith("Olmo"))
    assert (old.rope, old.rope_sliding) == (new.rope, new.rope_sliding)
    assert old.rope.kind == "yarn" and old.rope.attention_factor == 1.2079441541679836
    assert old.rope_sliding == Rope(theta=5e5)
    assert ModelConfig.from_hf(PUBLISHED["Llama-3.1-8B"]).rope.original_max_positions == 8192
    assert ModelConfig.from_hf(PUBLISHED["DeepSeek-R1-Distill-Qwen-7B"]).rope.theta == 1e4


def test_no_field_of_transformers_is_overlooked():
    """Each field of the four config classes is read, held to a value, or known to change nothing.

    A field that a later transformers adds fails here until somebody has looked at it.
    """
    transformers = pytest.importorskip("transformers")
    harmless = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"}
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    for name in ("LlamaConfig", "Qwen2Config", "Qwen3Config", "Olmo3Config"):
        fields = {field.name for field in dataclasses.fields(getattr(transformers, name))}
        known = config.KNOWN | set(config.ONLY) | harmless | base | {"mlp_bias"}
        assert fields <= known, f"{name} has fields that sdjax does not know: {fields - known}"


def test_windows_follow_each_familys_rule():
    """Qwen slides from max_window_layers on, and only if told; OLMo-3 in three layers of four."""
    qwen = ModelConfig.from_hf(families.CASES["qwen2-tied-window"])
    assert qwen.windows == (None, 5, 5)
    assert ModelConfig.from_hf(families.CASES["qwen2"]).windows == (None,) * 3
    assert ModelConfig.from_hf(OLMO3).windows == (5, 5, 5, None)


def test_old_olmo3_configs_stretch_full_layers_only():
    """The published OLMo-3 config.json has one flat rope_scaling, which sliding layers ignore."""
    cfg = ModelConfig.from_hf(families.CASES["olmo3-yarn-gqa1"])
    assert cfg.rope.kind == "yarn" and cfg.rope_sliding == Rope(theta=5e5)


def test_olmo3_ropes_by_layer_type():
    """transformers 5 writes one rope per kind; rope_scaling beside it changes full layers."""
    nested = {
        FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
        SLIDING: {"rope_type": "default", "rope_theta": 1e2},
    }
    cfg = ModelConfig.from_hf(OLMO3 | {"rope_parameters": nested, "rope_theta": 7.0})
    assert cfg.rope == Rope("linear", theta=1e3, factor=2.0)
    assert cfg.rope_sliding == Rope(theta=1e2)
    cfg = ModelConfig.from_hf(
        OLMO3 | {"rope_parameters": nested, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    )
    assert cfg.rope == Rope("linear", theta=1e3, factor=8.0)
    assert cfg.rope_sliding == Rope(theta=1e2)


def test_absent_fields_take_the_familys_default():
    raw = {k: v for k, v in QWEN3.items() if k not in ("num_key_value_heads", "head_dim")}
    assert ModelConfig.from_hf(raw | {"num_attention_heads": 64}).n_kv_heads == 32
    assert ModelConfig.from_hf(raw | {"num_key_value_heads": None}).n_kv_heads == 4
    assert ModelConfig.from_hf(raw | {"num_key_value_heads": None}).head_dim == 128
    raw = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    cfg = ModelConfig.from_hf(raw | {"rope_theta": None, "pretraining_tp": None})
    assert (cfg.n_kv_heads, cfg.norm_eps, cfg.rope.theta) == (4, 1e-6, 1e4)


def test_new_and_old_rope_fields_read_the_same():
    """transformers 5 nests rope_theta in rope_parameters; 4.x had rope_theta and rope_scaling."""
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": families.LLAMA3}
    new = LLAMA | {"rope_parameters": families.LLAMA3 | {"rope_theta": 5e5}}
    new.pop("rope_theta")
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_several_end_tokens_are_kept():
    cfg = ModelConfig.from_hf(LLAMA | {"eos_token_id": [2, 5]})
    assert cfg.eos_token_ids == (2, 5) and cfg.to_hf()["eos_token_id"] == [2, 5]


def test_families_are_covered():
    assert {raw["model_type"] for raw in families.CASES.values()} == set(FAMILIES)


def test_lora_targets_are_checked():
    with pytest.raises(ValueError, match="model.lora.targets"):
        LoraConfig(rank=4, alpha=8.0, targets=("q", "query"))
