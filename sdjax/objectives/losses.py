"""The objective on whole arrays of logits: for tests, scoring of reference cases and small studies.

The compiled step calls the same `token_loss` chunk by chunk; here the arrays are [B, T, V] and the
weights are computed from the mask on the spot. Masked positions may hold anything, NaN included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sdjax.objectives import aggregation, importance, policy_gradient
from sdjax.objectives.importance import masked_mean
from sdjax.objectives.objective import (
    ObjectiveConfig,
    Slots,
    policy_terms,
    sampler_weight,
    token_loss,
)
from sdjax.types import Array


def distillation_loss(
    student_logits: Array,
    teacher_logits: Array,
    targets: Array | None,
    mask: Array | None,
    *,
    sampler_logp: Array | None = None,
    config: ObjectiveConfig | Mapping[str, Any],
    old_logp: Array | None = None,
    has_teacher: Array | None = None,
    rollout_weights: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Divergence of student logits [B, T, V] from teacher logits, masked, weighted and aggregated.

    `targets` [B, T] are the sampled tokens (ids below 0 are read as 0; None where only the logits
    matter), `mask` [B, T] the response mask (None: every position), `has_teacher` [B] or [B, T]
    multiplies it. `old_logp` enters the ratio clip `is_clip` and, with `sampler_logp`, the
    truncated sampler weight `rollout_is_clip`; given `sampler_logp` alone the correction is made
    once, by `is_clip` when finite, else by `rollout_is_clip`. `rollout_weights` replaces that
    weight.
    The gradient reaches `student_logits` only. A `config` mapping goes through `as_config`.
    Returns the loss and metrics, among them `per_token_loss` [B, T] (before masking), `loss_mask`
    and `student_logp`. Raises ValueError when `targets` are missing and needed.
    """
    config = dataclasses.replace(as_config(config), pg_coef=0.0, kl_coef=0.0)
    ratios = old_logp is not None or sampler_logp is not None
    if targets is None and (ratios or config.support == "sampled"):
        raise ValueError(
            "targets is None, but importance ratios and objective.support='sampled' are taken at "
            "the sampled tokens: give their ids"
        )
    mask, config = _mask_or_all(mask, student_logits, config)
    if has_teacher is not None:
        mask = mask * has_teacher.reshape(has_teacher.shape + (1,) * (2 - has_teacher.ndim))
    mask = mask * _window(mask, config)
    if old_logp is None and sampler_logp is not None and math.isfinite(config.is_clip):
        old_logp, sampler_logp = sampler_logp, None
    weight, rollout_weights, sampler_logp = _weights(
        mask, old_logp, sampler_logp, rollout_weights, config
    )
    slots = Slots(
        targets=jnp.zeros(mask.shape, jnp.int32) if targets is None else jnp.maximum(targets, 0),
        weight=weight,
        distill_weight=weight,
        old_logp=_finite(old_logp, mask),
        sampler_logp=_finite(sampler_logp, mask),
        rollout_weight=rollout_weights,
    )
    student_logits, teacher_logits = _finite(student_logits, mask), _finite(teacher_logits, mask)
    weighted, seen = token_loss(student_logits, teacher_logits, slots, config, config.knobs())
    loss = _total(weighted, mask, config)
    seen["per_token_loss"] = seen["distill_loss"]
    seen["loss_mask"] = mask
    return loss, seen | _mean_metrics(seen, mask)


def policy_gradient_loss(
    logp: Array,
    old_logp: Array | None,
    sampler_logp: Array | None,
    advantage: Array | None,
    mask: Array | None,
    *,
    config: ObjectiveConfig | Mapping[str, Any],
    ref_logp: Array | None = None,
    teacher_logp: Array | None = None,
    rollout_weights: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Clipped policy-gradient loss from log-probabilities [B, T] of the sampled tokens.

    `old_logp` None means on-policy, `sampler_logp` None no sampler correction; `advantage` is [B]
    or [B, T]; `ref_logp` is what kl_coef refers to, `teacher_logp` modulates the advantage. With
    pg_coef 0 `advantage` may be None, and without `ref_logp` the reference is `old_logp`.
    `rollout_weights` [B, T] replaces the weight computed from `sampler_logp`.
    Returns the loss and metrics: `per_token_loss` (before masking), `loss_mask`, `rollout_weights`
    where there are any, `pg_clipfrac`, `pg_clipfrac_lower`, `ppo_kl` as in the reference. Raises
    ValueError when something that the config needs is missing.
    """
    config = as_config(config)
    if ref_logp is None and not config.uses_policy:
        ref_logp = old_logp
    for name, given, needed in (
        ("advantage", advantage, config.uses_policy),
        ("ref_logp", ref_logp, config.kl_coef),
        ("teacher_logp", teacher_logp, config.uses_policy and config.mod != "none"),
    ):
        if needed and given is None:
            raise ValueError(
                f"{name} is None, but objective.pg_coef={config.pg_coef}, kl_coef={config.kl_coef} "
                f"and mod={config.mod!r} need it"
            )
    if advantage is None:
        advantage = jnp.zeros(logp.shape[:1], logp.dtype)
    mask, config = _mask_or_all(mask, logp, config)
    weight, rollout_weights, sampler_logp = _weights(
        mask, old_logp, sampler_logp, rollout_weights, config
    )
    logp, old_logp = _finite(logp, mask), _finite(old_logp, mask)
    advantage = advantage if advantage.ndim == 2 else advantage[:, None]
    slots = Slots(
        targets=mask,
        weight=weight,
        distill_weight=weight,
        advantage=jnp.broadcast_to(advantage, logp.shape),
        old_logp=old_logp,
        sampler_logp=_finite(sampler_logp, mask),
        rollout_weight=rollout_weights,
    )
    knobs = config.knobs()
    u = None if teacher_logp is None else _finite(teacher_logp, mask) - logp
    per_token, flags = policy_terms(logp, u, slots, config, knobs)
    sampler = sampler_weight(logp, slots, config, knobs)
    per_token = per_token if sampler is None else per_token * sampler
    per_token = per_token * knobs.pg_coef
    metrics = {
        "pg_clipfrac": masked_mean(flags["clip"], mask),
        "pg_clipfrac_lower": masked_mean(flags["dual"], mask),
    }
    if old_logp is not None:
        metrics["ppo_kl"] = masked_mean(-policy_gradient.log_ratio(logp, old_logp), mask)
    if config.kl_coef:
        kl = policy_gradient.kl_penalty(logp, _finite(ref_logp, mask), config.kl_estimator)
        metrics["kl"] = masked_mean(kl, mask)
        per_token = per_token + config.kl_coef * kl
    if sampler is not None:
        metrics["rollout_weights"] = sampler
    metrics |= {"per_token_loss": per_token, "loss_mask": mask}
    return _total(per_token * weight, mask, config), metrics


def as_config(config: ObjectiveConfig | Mapping[str, Any]) -> ObjectiveConfig:
    """An ObjectiveConfig as it is; a mapping of its fields, or of a reference's parameters.

    A mapping with the key "source", or a recorded case's own entry with "name" and "params", goes
    through `ObjectiveConfig.from_reference`. Raises ValueError for a field that does not exist.
    """
    if isinstance(config, ObjectiveConfig):
        return config
    if "name" in config and "params" in config:
        return ObjectiveConfig.from_reference(config["name"], config["params"])
    params = dict(config)
    source = params.pop("source", None)
    if source is not None:
        return ObjectiveConfig.from_reference(source, params)
    unknown = set(params) - {field.name for field in dataclasses.fields(ObjectiveConfig)}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} is no field of ObjectiveConfig: for another codebase's "
            "spelling add its name under 'source' (ObjectiveConfig.from_reference)"
        )
    return ObjectiveConfig(**params)


def _mask_or_all(
    mask: Array | None, like: Array, config: ObjectiveConfig
) -> tuple[Array, ObjectiveConfig]:
    """The mask in the computing dtype; without one, sums over labels become sums over rows."""
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    if mask is not None:
        return mask.astype(dtype), config
    if config.loss_agg.startswith("labels-mean"):
        config = dataclasses.replace(config, loss_agg="row-sum-mean")
    return jnp.ones(like.shape[:2], dtype), config


def _window(mask: Array, config: ObjectiveConfig) -> Array:
    """1 on the response tokens inside skip_first <= t < prefix_len."""
    position = jnp.cumsum(mask > 0, -1) - 1
    window = aggregation.position_window(position, config.skip_first, config.prefix_len)
    return window.astype(mask.dtype)


def _weights(
    mask: Array,
    old_logp: Array | None,
    sampler_logp: Array | None,
    rollout_weights: Array | None,
    config: ObjectiveConfig,
) -> tuple[Array, Array | None, Array | None]:
    """Slot weights W [B, T]; the sampler's weight if it can be computed here; what is left."""
    rows = aggregation.grouped_row_weights(
        mask.sum(-1),
        config.loss_agg,
        config.microbatch,
        norm_n=config.norm_n,
        padded_len=mask.shape[-1],
        xp=jnp,
    )
    if rollout_weights is None and sampler_logp is not None and old_logp is not None:
        if math.isfinite(config.rollout_is_clip):
            rollout_weights = importance.rollout_weight(
                old_logp,
                sampler_logp,
                mask,
                config.rollout_is_clip,
                config.rollout_is_level,
                config.rollout_is_normalize,
            )
        sampler_logp = None
    return rows[:, None] * mask, rollout_weights, sampler_logp


def _finite(x: Array | None, mask: Array) -> Array | None:
    """Zeroes what is not finite at masked positions: 0 * NaN would reach the gradient."""
    if x is None:
        return None
    keep = mask > 0
    keep = keep if x.ndim == mask.ndim else keep[..., None]
    return jnp.where(keep | jnp.isfinite(x), x, 0.0)


def _total(weighted: Array, mask: Array, config: ObjectiveConfig) -> Array:
    """The loss; OPSD's normaliser gives NaN (with zero gradient) when nothing is valid."""
    total = jnp.where(mask > 0, weighted, 0.0).sum()
    if config.loss_agg == "labels-mean-unclamped":
        total = jnp.where(mask.sum() > 0, total, jnp.nan)
    return total


def _mean_metrics(seen: dict[str, Array], mask: Array) -> dict[str, Array]:
    """Masked means of the per-token measurements."""
    names = ("divergence", "student_entropy", "teacher_entropy")
    return {f"{name}_mean": masked_mean(seen[name], mask) for name in names if name in seen}
