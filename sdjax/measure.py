"""What the compiled step reports: masked means and quantiles over the response tokens.

Inputs are the per-slot measurements of `objectives.token_loss` [A, B, R]; outputs are scalars named
area/name (docs/metrics). Sums in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.objectives.importance import effective_sample_size, masked_mean
from sdjax.objectives.objective import Knobs
from sdjax.types import Array, PackedBatch

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


def masked_quantiles(x: Array, mask: Array) -> dict[str, Array]:
    """QUANTILES of the entries inside the mask (lower neighbour); 0 when there are none."""
    flat = jnp.sort(jnp.where(mask > 0, x, jnp.inf).reshape(-1))
    count = (mask > 0).sum()
    place = lambda q: jnp.clip(jnp.floor(q * (count - 1)).astype(jnp.int32), 0, flat.size - 1)
    return {name: jnp.where(count > 0, flat[place(q)], 0.0) for name, q in QUANTILES.items()}


def ratio_metrics(
    prefix: str, log_ratio: Array, mask: Array, cap: Array | float
) -> dict[str, Array]:
    """Quantiles, effective sample size and share above `cap` of exp(log_ratio)."""
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    out = {f"{prefix}_{name}": x for name, x in masked_quantiles(ratio, mask).items()}
    return out | {
        f"{prefix}_ess": effective_sample_size(ratio, mask),
        f"{prefix}_capped_frac": masked_mean((ratio > cap).astype(ratio.dtype), mask),
    }


def waste_metrics(batch: PackedBatch) -> dict[str, Array]:
    """Share of the rows' capacity that holds nothing, over the micro-batches that are run."""
    out = {}
    for side in ("student", "teacher"):
        rows = getattr(batch, side)
        if rows is not None:
            filled = (rows.segment_ids > 0).astype(jnp.float32).mean((1, 2))
            out[f"batch/{side}_waste"] = 1.0 - filled.sum() / jnp.maximum((filled > 0).sum(), 1)
    return out


def word_metrics(
    divergence: Array, targets: Array, mask: Array, word_of_token: Array, words: tuple[str, ...]
) -> dict[str, Array]:
    """Mean divergence on the tokens of each word class, and how many tokens it has."""
    word = jnp.where(mask > 0, word_of_token[targets], 0).reshape(-1)
    total = jax.ops.segment_sum((divergence * mask).reshape(-1), word, len(words) + 1)
    count = jax.ops.segment_sum(mask.reshape(-1), word, len(words) + 1)
    mean = total / jnp.maximum(count, 1.0)
    out = {f"distill/divergence_word_{w}": mean[i] for i, w in enumerate(words, 1)}
    return out | {f"distill/tokens_word_{w}": count[i] for i, w in enumerate(words, 1)}


def step_metrics(
    loss: Array,
    seen: dict[str, Array],
    batch: PackedBatch,
    knobs: Knobs,
    word_of_token: Array | None = None,
    words: tuple[str, ...] = (),
) -> dict[str, Array]:
    """All scalars of one update except the optimizer's."""
    mask = batch.mask.astype(jnp.float32)
    distilled = (batch.distill_weight > 0).astype(jnp.float32)
    logp = seen["student_logp"]
    out = {
        "loss/total": loss,
        "batch/response_tokens": mask.sum(),
        "batch/distilled_frac": distilled.sum() / jnp.maximum(mask.sum(), 1.0),
        "student/logp": masked_mean(logp, mask),
    }
    for name, weight in (("policy_loss", batch.weight), ("distill_loss", batch.distill_weight)):
        if name in seen:
            out[f"loss/{name.removesuffix('_loss')}"] = (seen[name] * weight).sum()
    if "student_entropy" in seen:
        out["student/entropy"] = masked_mean(seen["student_entropy"], mask)
    if "kl" in seen:
        out["loss/kl_to_initial"] = masked_mean(seen["kl"], mask)
    if "clip" in seen:
        out["policy/clip_frac"] = masked_mean(seen["clip"], mask)
        out["policy/dual_clip_frac"] = masked_mean(seen["dual"], mask)
    if "teacher_logp" in seen:
        out |= _teacher_metrics(seen, batch, distilled, word_of_token, words)
    return out | waste_metrics(batch) | _drift_metrics(logp, batch, mask, knobs)


def _teacher_metrics(
    seen: dict[str, Array],
    batch: PackedBatch,
    distilled: Array,
    word_of_token: Array | None,
    words: tuple[str, ...],
) -> dict[str, Array]:
    """How teacher and student differ on the distilled tokens."""
    u = seen["teacher_logp"] - seen["student_logp"]
    out = {
        "self_distillation/empty_target_batch": (distilled.sum() == 0).astype(jnp.float32),
        "distill/u_mean": masked_mean(u, distilled),
        "distill/u_abs": masked_mean(jnp.abs(u), distilled),
    }
    if "teacher_entropy" in seen:
        out["teacher/entropy"] = masked_mean(seen["teacher_entropy"], distilled)
    if "divergence" in seen:
        divergence = seen["divergence"]
        out["distill/divergence"] = masked_mean(divergence, distilled)
        for name, x in masked_quantiles(divergence, distilled).items():
            out[f"distill/divergence_{name}"] = x
        if word_of_token is not None:
            out |= word_metrics(divergence, batch.targets, distilled, word_of_token, words)
    return out


def _drift_metrics(logp: Array, batch: PackedBatch, mask: Array, knobs: Knobs) -> dict[str, Array]:
    """Trainer against sampler (before any update on the batch), and current against old policy."""
    old = logp if batch.old_logp is None else batch.old_logp
    gap = jnp.where(mask > 0, old - batch.sampler_logp, 0.0)
    out = {
        # multiplicative: 1.05 says that probabilities differ by 5% on average
        "drift/prob_error": masked_mean(jnp.exp(jnp.abs(gap)), mask),
        "drift/sampler_kl": masked_mean(-gap, mask),
        "drift/sampler_k3": masked_mean(jnp.exp(gap) - gap - 1, mask),
        "drift/sampler_chi2": masked_mean(jnp.exp(2 * gap), mask) - 1,
    }
    out |= ratio_metrics("drift/sampler_ratio", gap, mask, knobs.rollout_is_clip)
    if batch.ref_logp is not None:
        moved = jnp.where(mask > 0, logp - batch.ref_logp, 0.0)
        out["policy/kl_initial"] = masked_mean(moved, mask)
        out["policy/kl_initial_k3"] = masked_mean(jnp.exp(-moved) + moved - 1, mask)
    if batch.old_logp is not None:
        out["policy/kl_to_old"] = masked_mean(old - logp, mask)
        out |= ratio_metrics("policy/ratio", logp - old, mask, knobs.is_clip)
    return out
