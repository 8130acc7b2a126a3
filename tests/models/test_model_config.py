"""config.json in and out; every field that would change the mathematics is honoured or refused."""

import dataclasses

import families
import pytest

from sdjax.models.config import FAMILIES, LoraConfig, ModelConfig
from sdjax.models.rope import Rope

LLAMA = families.CASES["llama-tied"]
QWEN3 = families.CASES["qwen3-tied"]
OLMO3 = families.CASES["olmo3"]


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
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "x=1"),
        (LLAMA, {"rope_scaling": families.YARN | {"truncate": False}}, "truncate=false"),
        (QWEN3, {"num_experts": 8}, "num_experts=8"),
        (QWEN3, {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (QWEN3, {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        (OLMO3, {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (OLMO3, {"rope_parameters": {"rope_type": "default", "factor": 1}}, "nested"),
    ],
)
def test_refuses_by_name(base, change, named):
    """Never run wrongly in silence: one sentence that names the field and its value."""
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(base | change)


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
