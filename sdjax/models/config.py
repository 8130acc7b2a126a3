"""What a decoder computes, as one hashable value, read from and written to config.json.

Knows four families by `model_type`: llama, qwen2, qwen3, olmo3. Anything that would change the
mathematics and is not implemented is refused by name; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.models.rope import Rope

FAMILIES = ("llama", "qwen2", "qwen3", "olmo3")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
DEFAULT_THETA = {"llama": 1e4, "qwen2": 1e4, "qwen3": 1e4, "olmo3": 5e5}
DEFAULT_EPS = {"llama": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6, "olmo3": 1e-5}
DEFAULT_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768, "olmo3": 2048}
DEFAULT_KV_HEADS = {"qwen2": 32, "qwen3": 32}  # without the field; the others take all heads
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Fields that change the mathematics, with the only values (besides absence) that are implemented.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1.0,),
    "attention_dropout": (0.0,),
    "is_causal": (True,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
}
# Fields that are read, or that change nothing although their names sound like it.
KNOWN = {
    *REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attn_implementation",
    "use_flash_attn",
    "output_attentions",
    "chunk_size_feed_forward",
}
# An unknown field with one of these in its name may change the mathematics: it is refused unless
# its value is empty, zero or false.
TELLING = (
    *("activation", "_act", "attn", "attention", "sink", "softcap", "logit", "qkv", "head"),
    *("bias", "norm", "scal", "multiplier", "residual", "layer", "embed", "dropout", "gating"),
    *("rope", "rotary", "alibi", "yarn", "position", "window", "chunk", "sparse", "linear"),
    *("expert", "moe", "router", "quant", "lora", "rank", "latent", "conv_", "ssm", "mamba"),
)
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) A B on each of `targets`, names of PROJECTIONS.

    `dropout` is the rate on the adapter's input during training (PEFT's lora_dropout).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    dropout: float = 0.0

    def __post_init__(self):
        unknown = [t for t in self.targets if t not in PROJECTIONS]
        if unknown or not self.targets:
            raise ValueError(
                f"model.lora.targets={self.targets!r}: choose from {', '.join(PROJECTIONS)}"
            )

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of a decoder. Hashable, so it can be a static argument of jit.

    `windows` has one entry per layer: how many tokens a token sees including itself, None for all
    before it. Sliding layers rotate with `rope_sliding`, the others with `rope`. `qk_norm` is
    "none", "head" (each head by itself, qwen3) or "projection" (all heads together, olmo3);
    `post_norm` puts a block's norm on its output (olmo3) instead of its input.
    """

    model_type: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope: Rope = Rope()
    rope_sliding: Rope = Rope()
    windows: tuple[int | None, ...] = ()
    norm_eps: float = 1e-6
    qk_norm: str = "none"
    post_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_positions: int = 4096
    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.n_layers)
        if len(self.windows) != self.n_layers:
            raise ValueError(
                f"layer_types of config.json has {len(self.windows)} entries, but "
                f"num_hidden_layers is {self.n_layers}: they must agree"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.n_heads} of config.json is not a multiple of "
                f"num_key_value_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} of config.json is odd: rope needs pairs")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads the dict of a config.json. Raises ValueError naming the field it cannot honour."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"model_type={family!r} of config.json is not implemented: "
                f"sdjax knows {', '.join(FAMILIES)}"
            )
        _refuse_unknown_mathematics(raw, family)
        heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
        attention_bias = bool(raw.get("attention_bias", False))
        rope, rope_sliding = _ropes(raw, family)
        eos = raw.get("eos_token_id")
        default_head_dim = 128 if family == "qwen3" else raw["hidden_size"] // heads
        kv_heads = raw.get("num_key_value_heads", DEFAULT_KV_HEADS.get(family))
        eps = raw.get("rms_norm_eps")
        return cls(
            model_type=family,
            vocab_size=raw["vocab_size"],
            d_model=raw["hidden_size"],
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=raw.get("head_dim") or default_head_dim,
            d_ff=raw["intermediate_size"],
            rope=rope,
            rope_sliding=rope_sliding,
            windows=_windows(raw, family, layers),
            norm_eps=DEFAULT_EPS[family] if eps is None else eps,
            qk_norm={"qwen3": "head", "olmo3": "projection"}.get(family, "none"),
            post_norm=family == "olmo3",
            qkv_bias=True if family == "qwen2" else attention_bias,
            o_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_positions=raw.get("max_position_embeddings", DEFAULT_POSITIONS[family]),
            init_std=raw.get("initializer_range", 0.02),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else _some(eos),
            pad_token_id=raw.get("pad_token_id"),
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The config.json that makes `transformers` compute the same (4.x or 5.x)."""
        eos = self.eos_token_ids
        out = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.init_std,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
            "use_cache": True,
        }
        if self.model_type != "qwen2":
            out["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        return out | _hf_windows(self) | _hf_rope(self)


def _some(value: int | None) -> tuple[int, ...]:
    return () if value is None else (value,)


def _refuse_unknown_mathematics(raw: Mapping[str, Any], family: str) -> None:
    missing = [field for field in REQUIRED if raw.get(field) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: nothing is guessed")
    for field, allowed in ONLY.items():
        if raw.get(field) is not None and raw[field] not in allowed:
            raise ValueError(
                f"{field}={raw[field]!r} of config.json is not implemented: "
                f"sdjax computes only {field}={allowed[0]!r}"
            )
    known = KNOWN | set(ONLY) | ({"mlp_bias"} if family == "llama" else set())
    for field, value in raw.items():
        telling = any(part in field.lower() for part in TELLING)
        if value and telling and field not in known and not field.startswith("_"):
            raise ValueError(
                f"{field}={value!r} of config.json is not implemented for model_type={family!r}: "
                "if it changes nothing that the model computes, take it out of config.json"
            )


def _windows(raw: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, derived from the fields as transformers does."""
    kinds, window = raw.get("layer_types"), raw.get("sliding_window")
    if family == "llama":
        if window is not None or (kinds and set(kinds) != {FULL}):
            raise ValueError(
                f"sliding_window={window!r}, layer_types={kinds!r} of config.json: "
                "sliding attention is not implemented for model_type='llama'"
            )
        return (None,) * layers
    if family == "olmo3":
        window = raw.get("sliding_window", 4096)
        kinds = kinds or [FULL if (i + 1) % 4 == 0 else SLIDING for i in range(layers)]
    else:
        window = window if raw.get("use_sliding_window", False) else None
        first = raw.get("max_window_layers", 28)
        sliding = [window is not None and i >= first for i in range(layers)]
        kinds = kinds or [SLIDING if s else FULL for s in sliding]
    unknown = set(kinds) - {SLIDING, FULL}
    if unknown:
        raise ValueError(f"layer_types of config.json has {sorted(unknown)}: not implemented")
    if SLIDING in kinds and not window:
        raise ValueError(
            f"layer_types of config.json has {SLIDING!r}, but sliding_window is {window!r} "
            "(or use_sliding_window is false): say how wide the window is"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _ropes(raw: Mapping[str, Any], family: str) -> tuple[Rope, Rope]:
    """(rope of full layers, rope of sliding layers), from either generation of the field names."""
    theta = DEFAULT_THETA[family] if raw.get("rope_theta") is None else raw["rope_theta"]
    positions = raw.get("max_position_embeddings", DEFAULT_POSITIONS[family])
    scaling, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if family == "olmo3":
        return _olmo3_ropes(scaling, new, theta, positions)
    if FULL in new or SLIDING in new:
        raise ValueError(
            "rope_parameters of config.json is nested by layer type: not implemented for "
            f"model_type={family!r}, whose layers share one rope"
        )
    rope = Rope.from_hf(scaling or new, theta, positions)
    return rope, rope


def _olmo3_ropes(
    scaling: Mapping[str, Any], new: Mapping[str, Any], theta: float, positions: int
) -> tuple[Rope, Rope]:
    """Full layers are stretched by rope_scaling, sliding ones, which never look far, are not."""
    if set(new) - {FULL, SLIDING}:
        raise ValueError(
            "rope_parameters of config.json is not nested by layer type: model_type='olmo3' "
            f"needs an entry {FULL!r} and an entry {SLIDING!r}"
        )
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"type={scaling['type']!r} in rope_scaling of config.json: transformers 5 does not "
            "read it for model_type='olmo3', earlier ones do; call it rope_type"
        )
    full, sliding = {**(new.get(FULL) or {}), **scaling}, new.get(SLIDING) or {}
    # transformers 4 turned sliding layers by the one rope_theta too, 5 turns them by the default.
    if theta != DEFAULT_THETA["olmo3"] and sliding.get("rope_theta") is None:
        raise ValueError(
            f"rope_theta={theta!r} of config.json does not say whether it is meant for sliding "
            "layers too (transformers 4 and 5 differ): write it into rope_parameters, into an "
            f"entry {FULL!r} and an entry {SLIDING!r}"
        )
    return Rope.from_hf(full, theta, positions), Rope.from_hf(sliding, theta, positions)


def _hf_windows(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.model_type == "llama":
        return {}
    window = next((w for w in cfg.windows if w is not None), None)
    out: dict[str, Any] = {
        "sliding_window": window,
        "layer_types": [FULL if w is None else SLIDING for w in cfg.windows],
    }
    if cfg.model_type != "olmo3":
        out["use_sliding_window"] = window is not None
        sliding = [i for i, w in enumerate(cfg.windows) if w is not None]
        out["max_window_layers"] = sliding[0] if sliding else cfg.n_layers
    return out


def _hf_rope(cfg: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for transformers 4, `rope_parameters` for 5."""
    old: dict[str, Any] = {"rope_theta": cfg.rope.theta}
    if cfg.rope.kind != "default":
        old["rope_scaling"] = cfg.rope.to_hf()
    if cfg.model_type == "olmo3":
        nested = {FULL: cfg.rope.to_hf(), SLIDING: cfg.rope_sliding.to_hf()}
        return old | {"rope_parameters": nested}
    return old | {"rope_parameters": cfg.rope.to_hf()}
