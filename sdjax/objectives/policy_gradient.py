"""Policy-gradient terms per token: PPO clip, dual clip, KL penalties, ratio clip.

Pure functions on log-probabilities of the sampled tokens, any shape; no masks, no normalisers.
Importance weights against the sampler live in `importance.py`.
Source: METHODS 1.5 and 2 (verl's `core_algos.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.objectives.divergence import clamp, clamp_max
from sdjax.types import Array

RATIO_BOUND = 20.0  # log-ratios are clipped to +-20 before the exponential
KL_ESTIMATORS = ("k1", "abs", "k2", "k3")


def log_ratio(logp: Array, old_logp: Array) -> Array:
    """clip(logp - old_logp, -20, 20)."""
    return clamp(logp - old_logp, -RATIO_BOUND, RATIO_BOUND)


def ppo_terms(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    clip_low: Array | float,
    clip_high: Array | float,
    dual_c: Array | float = jnp.inf,
) -> tuple[Array, dict[str, Array]]:
    """Clipped surrogate per token, and which branch won.

      l = max(-A r, -A clip(r, 1-clip_low, 1+clip_high)),  r = exp(log_ratio);
      for A < 0 besides l = min(l, -dual_c A)   (dual_c = inf switches it off)

    The flags `clip` and `dual` are 0/1 in the dtype of `logp`.
    """
    ratio = jnp.exp(log_ratio(logp, old_logp))
    plain = -advantage * ratio
    clipped = -advantage * clamp(ratio, 1 - clip_low, 1 + clip_high)
    worst = jnp.maximum(plain, clipped)
    negative = advantage < 0
    # a bound of -A * inf must not turn A = 0 into NaN
    bound = jnp.where(negative, -advantage, 1.0) * dual_c
    loss = jnp.where(negative, jnp.minimum(worst, bound), worst)
    flags = {
        "clip": (clipped > plain).astype(logp.dtype),
        "dual": (negative & (worst > bound)).astype(logp.dtype),
    }
    return loss, flags


def kl_penalty(logp: Array, ref_logp: Array, estimator: str) -> Array:
    """Per-token estimate of KL(policy||reference) from sampled tokens.

      k1: logp - ref     abs: |k1|     k2: (logp - ref)^2 / 2
      k3: exp(d) - d - 1 with d = ref - logp clipped to +-20, the result clipped to +-10

    Raises ValueError for other names ("k3+" of verl raises there too).
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return jnp.abs(difference)
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    if estimator == "k3":
        d = clamp(-difference, -RATIO_BOUND, RATIO_BOUND)
        return clamp(jnp.exp(d) - d - 1, -10.0, 10.0)
    raise ValueError(
        f"objective.kl_estimator={estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}"
    )


def ratio_weight(logp: Array, old_logp: Array, is_clip: Array | float) -> Array:
    """SDPO's one-sided factor min(exp(log_ratio), is_clip), without gradient."""
    return jax.lax.stop_gradient(clamp_max(jnp.exp(log_ratio(logp, old_logp)), is_clip))
