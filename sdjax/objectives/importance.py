"""How far the sampler and the trainer disagree: truncated weights and mismatch metrics.

Arrays are [B, T] log-probabilities of the sampled tokens; nothing here has a gradient.
Source: METHODS 1.5 and 3.4 (verl's `rollout_corr_helper.py`), whose metric names are kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.objectives.divergence import clamp, clamp_max
from sdjax.objectives.policy_gradient import RATIO_BOUND
from sdjax.types import Array

EPS = 1e-8  # the reference adds it to every masked mean's denominator


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
    """sum(x m) / (sum(m) + 1e-8); entries outside the mask may hold anything."""
    return jnp.where(mask > 0, x * mask, 0.0).sum(axis) / (mask.sum(axis) + EPS)


def raw_weight(
    old_logp: Array, sampler_logp: Array, mask: Array, level: str = "token"
) -> tuple[Array, Array]:
    """Untruncated weight exp(clip(log-ratio, +-20)) and the unclipped log-ratio, both [B, T].

    Level "sequence" uses the sum of the log-ratio over the response for each of its tokens.
    """
    gap = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    if level == "sequence":
        gap = jnp.broadcast_to(gap.sum(-1, keepdims=True), gap.shape)
    elif level != "token":
        raise ValueError(f"objective.tis_level={level!r} is unknown: use 'token' or 'sequence'")
    gap = jax.lax.stop_gradient(gap)
    return jnp.exp(clamp(gap, -RATIO_BOUND, RATIO_BOUND)), gap


def rollout_weight(
    old_logp: Array,
    sampler_logp: Array,
    mask: Array,
    tis_clip: Array | float,
    level: str = "token",
    batch_normalize: bool = False,
) -> Array:
    """Truncated importance weights between the trainer's old policy and the sampler.

      token:    w_t = min(exp(clip(old_t - sampler_t, +-20)), tis_clip) m_t
      sequence: the same of sum_t m_t (old_t - sampler_t)

    `batch_normalize` divides by the mean over valid tokens, or over rows with a valid token.
    """
    mask = mask.astype(old_logp.dtype)
    weight = clamp_max(raw_weight(old_logp, sampler_logp, mask, level)[0], tis_clip) * mask
    if batch_normalize:
        weight = weight / batch_norm_factor(weight, mask, level)
    return weight


def batch_norm_factor(weight: Array, mask: Array, level: str) -> Array:
    """Mean truncated weight over valid tokens, or over rows with a valid token."""
    if level == "token":
        return jnp.maximum(masked_mean(weight, mask), EPS)
    rows = masked_mean(weight, mask, -1)
    valid = (mask.sum(-1) > 0).astype(weight.dtype)
    return jnp.maximum((rows * valid).sum() / jnp.maximum(valid.sum(), EPS), EPS)


def importance_metrics(
    old_logp: Array, sampler_logp: Array, mask: Array, threshold: float, level: str = "token"
) -> dict[str, Array]:
    """Mean, extremes, spread and effective sample size of the untruncated weights.

    Fractions high and low count ratios beyond `threshold` and 1/threshold; std and effective
    sample size are taken after clipping to that interval.
    """
    mask = mask.astype(old_logp.dtype)
    weight, gap = raw_weight(old_logp, sampler_logp, mask, level)
    low, valid = 1.0 / threshold, mask > 0
    if level == "sequence":
        row_gap = gap[..., 0]
        high_frac = (row_gap > jnp.log(threshold)).mean()
        low_frac = (row_gap < jnp.log(low)).mean()
        largest = jnp.exp(jnp.minimum(row_gap.max(), RATIO_BOUND))
        smallest = jnp.exp(row_gap.min())
    else:
        high_frac = masked_mean((weight > threshold).astype(weight.dtype), mask)
        low_frac = masked_mean((weight < low).astype(weight.dtype), mask)
        largest = jnp.where(valid, weight, -jnp.inf).max()
        smallest = jnp.where(valid, weight, jnp.inf).min()
    inside = clamp(weight, low, threshold)
    mean_inside = masked_mean(inside, mask)
    variance = masked_mean(jnp.square(inside), mask) - jnp.square(mean_inside)
    metrics = {
        "rollout_is_mean": masked_mean(weight, mask),
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        "rollout_is_std": jnp.sqrt(jnp.maximum(variance, 0.0)),
        "rollout_is_eff_sample_size": effective_sample_size(inside, mask),
        "rollout_is_ratio_fraction_high": high_frac,
        "rollout_is_ratio_fraction_low": low_frac,
    }
    return metrics | _row_metrics(weight, mask, threshold)


def _row_metrics(weight: Array, mask: Array, threshold: float) -> dict[str, Array]:
    """The same per response: each row's mean weight."""
    rows = masked_mean(weight, mask, -1)
    return {
        "rollout_is_seq_mean": rows.mean(),
        "rollout_is_seq_std": rows.std(ddof=1) if rows.size > 1 else jnp.zeros((), rows.dtype),
        "rollout_is_seq_max": rows.max(),
        "rollout_is_seq_min": rows.min(),
        "rollout_is_seq_max_deviation": jnp.abs(rows - 1).max(),
        "rollout_is_seq_fraction_high": (rows > threshold).mean(),
        "rollout_is_seq_fraction_low": (rows < 1.0 / threshold).mean(),
    }


def effective_sample_size(weight: Array, mask: Array) -> Array:
    """1 / mean((w / mean w)^2) over the valid tokens, in (0, 1]."""
    scaled = weight / (masked_mean(weight, mask) + EPS)
    return 1.0 / masked_mean(jnp.square(scaled), mask)


def offpolicy_metrics(old_logp: Array, sampler_logp: Array, mask: Array) -> dict[str, Array]:
    """Perplexities of both policies, KL(sampler||trainer) estimates and chi-squared."""
    mask = mask.astype(old_logp.dtype)
    old = masked_mean(old_logp, mask, -1)
    sampler = masked_mean(sampler_logp, mask, -1)
    gap = jnp.where(mask > 0, old_logp - sampler_logp, 0.0)
    row_gap = clamp(gap.sum(-1), -RATIO_BOUND, RATIO_BOUND)
    difference = sampler - old
    return {
        "training_ppl": jnp.exp(-old).mean(),
        "training_log_ppl": -old.mean(),
        "kl": masked_mean(-gap, mask),
        "k3_kl": masked_mean(jnp.exp(gap) - gap - 1, mask),
        "rollout_ppl": jnp.exp(-sampler).mean(),
        "rollout_log_ppl": -sampler.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": jnp.abs(difference).mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": jnp.exp(difference).mean(),
        "chi2_token": masked_mean(jnp.exp(2 * gap), mask) - 1,
        "chi2_seq": jnp.exp(2 * row_gap).mean() - 1,
    }


def prob_error(trainer_logp: Array, sampler_logp: Array, mask: Array) -> Array:
    """Multiplicative probability error exp(mean |trainer - sampler|) over valid tokens, >= 1."""
    return jnp.exp(
        masked_mean(jnp.abs(trainer_logp - sampler_logp), mask.astype(trainer_logp.dtype))
    )
