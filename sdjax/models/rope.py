"""Rotary position embedding: frequencies (linear, llama3 and YaRN scaling) and the rotation.

Rotates the first half of a head against the second half (the Hugging Face layout). Dynamic
scalings, whose frequencies depend on the length of the sequence, are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Which keys each scaling may have; a key that we do not read could change the mathematics.
KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Base frequency and scaling. `kind` is default, linear, llama3 or yarn.

    `attention_factor` multiplies cos and sin (YaRN's temperature); the other fields are those of
    config.json and are read only by the kinds that know them.
    """

    kind: str = "default"
    theta: float = 1e4
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], theta: float, max_positions: int) -> Rope:
        """Reads rope_scaling or rope_parameters; ValueError names what is unknown."""
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in KEYS:
            raise ValueError(
                f"rope_type={kind!r} of config.json is not implemented: "
                f"sdjax knows {', '.join(KEYS)}"
            )
        known = {"rope_type", "type", "rope_theta", *KEYS[kind]}
        unknown = sorted(k for k, v in raw.items() if k not in known and v is not None)
        if unknown == ["partial_rotary_factor"] and raw["partial_rotary_factor"] == 1:
            unknown = []
        if unknown:
            raise ValueError(
                f"{unknown[0]}={raw[unknown[0]]!r} in the rope parameters of config.json is not "
                f"implemented for rope_type={kind!r}"
            )
        if raw.get("truncate", True) is not True:
            raise ValueError(
                "truncate=false in the rope parameters of config.json: not implemented"
            )
        theta = float(theta if raw.get("rope_theta") is None else raw["rope_theta"])
        if kind == "default":
            return cls(theta=theta)
        missing = [key for key in NEEDED[kind] if raw.get(key) is None]
        if missing:
            raise ValueError(
                f"the rope parameters of config.json lack {missing[0]} (rope_type={kind!r})"
            )
        factor = float(raw["factor"])
        if kind == "linear":
            return cls(kind="linear", theta=theta, factor=factor)
        original = int(raw.get("original_max_position_embeddings") or max_positions)
        if kind == "llama3":
            return cls(
                kind="llama3",
                theta=theta,
                factor=factor,
                original_max_positions=original,
                low_freq_factor=float(raw["low_freq_factor"]),
                high_freq_factor=float(raw["high_freq_factor"]),
            )
        return cls(
            kind="yarn",
            theta=theta,
            factor=factor,
            original_max_positions=original,
            attention_factor=_yarn_attention_factor(raw, factor),
            beta_fast=float(raw.get("beta_fast") or 32),
            beta_slow=float(raw.get("beta_slow") or 1),
        )

    def to_hf(self) -> dict[str, Any]:
        """The rope_parameters of a config.json."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            out["factor"] = self.factor
        if self.kind in ("llama3", "yarn"):
            out["original_max_position_embeddings"] = self.original_max_positions
        if self.kind == "llama3":
            out |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
            }
        if self.kind == "yarn":
            out |= {
                "attention_factor": self.attention_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
            }
        return out

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair, float32 [C/2].

        In float32 throughout, as the checkpoints were trained: in float64 the angles at long
        positions would differ in the last places.
        """
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        freq = (1.0 / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.kind == "linear":
            freq = freq / np.float32(self.factor)
        elif self.kind == "llama3":
            freq = self._llama3(freq)
        elif self.kind == "yarn":
            freq = self._yarn(freq, head_dim)
        return freq.astype(np.float32)

    def _llama3(self, freq: np.ndarray) -> np.ndarray:
        """Long waves divided by `factor`, short ones kept, a linear blend between (Llama 3.1)."""
        turns = self.original_max_positions * freq / np.float32(2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return freq * keep + freq / self.factor * (1.0 - keep)

    def _yarn(self, freq: np.ndarray, head_dim: int) -> np.ndarray:
        """YaRN (https://arxiv.org/abs/2309.00071, eq. 23): a ramp over pairs."""

        def pair(turns: float) -> float:
            positions = self.original_max_positions / (turns * 2 * math.pi)
            return head_dim * math.log(positions) / (2 * math.log(self.theta))

        low = max(math.floor(pair(self.beta_fast)), 0)
        high = min(math.ceil(pair(self.beta_slow)), head_dim - 1)
        width = (high - low) or 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
        return freq / self.factor * ramp + freq * (1.0 - ramp)


def _yarn_attention_factor(raw: Mapping[str, Any], factor: float) -> float:
    if raw.get("attention_factor") is not None:
        return float(raw["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if raw.get("mscale") and raw.get("mscale_all_dim"):
        return scale(raw["mscale"]) / scale(raw["mscale_all_dim"])
    return scale(1.0)


def angles(
    rope: Rope, positions_BT: Int[Array, "B T"], head_dim: int
) -> tuple[Float[Array, "B T 1 C/2"], Float[Array, "B T 1 C/2"]]:
    """(cos, sin) of each position and pair, float32, with an axis for the heads."""
    freq = jnp.asarray(rope.frequencies(head_dim))
    angle_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * freq
    return jnp.cos(angle_BT1C) * rope.attention_factor, jnp.sin(angle_BT1C) * rope.attention_factor


def rotate(x_BTHC: Array, cos_sin: tuple[Array, Array]) -> Array:
    """Turns each pair (i, i + C/2) of a head by its angle; computes in float32 or wider."""
    cos, sin = cos_sin
    wide = jnp.promote_types(x_BTHC.dtype, jnp.float32)
    first, second = jnp.split(x_BTHC.astype(wide), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x_BTHC.dtype)
