"""Divergences between a student and a teacher distribution, and the supports they are taken on.

Pure functions on log-probabilities; nothing here knows of masks, weights or models. The student is
p, the teacher q; alpha = 0 is the forward KL(q||p), alpha = 1 the reverse KL(p||q), between them
the generalised Jensen-Shannon divergence, which vanishes at both ends and does not meet the KLs.
Source: METHODS 1.1 and 1.2, "Reinforcement Learning via Self-Distillation" (arXiv:2601.20802),
checked against its code in tests/objectives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.objectives.partition import log_sum_exp
from sdjax.types import Array

TAIL_FLOOR = 1e-7  # mass the reference leaves in the tail bucket when the top k holds everything


def clamp_max(x: Array, high: Array | float) -> Array:
    """min(x, high) whose gradient passes at equality, as torch.clamp's does."""
    return jnp.where(x > high, jnp.asarray(high, x.dtype), x)


def clamp(x: Array, low: Array | float, high: Array | float) -> Array:
    """Clips to [low, high]; the gradient passes inside and at the bounds, as torch.clamp's does."""
    return jnp.where(x < low, jnp.asarray(low, x.dtype), clamp_max(x, high))


def _relative(logp_a: Array, logp_b: Array) -> Array:
    """a (log a - log b) elementwise, 0 where a is 0, without NaN in value or gradient."""
    positive = logp_a > -jnp.inf
    safe_a = jnp.where(positive, logp_a, 0.0)
    safe_b = jnp.where(positive, logp_b, 0.0)
    return jnp.where(positive, jnp.exp(safe_a) * (safe_a - safe_b), 0.0)


def forward_kl_terms(student_logp: Array, teacher_logp: Array) -> Array:
    """q (log q - log p), elementwise; their sum is KL(teacher||student)."""
    return _relative(teacher_logp, student_logp)


def reverse_kl_terms(student_logp: Array, teacher_logp: Array) -> Array:
    """p (log p - log q), elementwise; their sum is KL(student||teacher)."""
    return _relative(student_logp, teacher_logp)


def jsd_terms(student_logp: Array, teacher_logp: Array, alpha: Array | float) -> Array:
    """(1-a) p (log p - log m) + a q (log q - log m), elementwise, with m = (1-a) p + a q.

    `alpha` is the teacher's share, strictly between 0 and 1 (a traced one is clipped to
    [1e-6, 1-1e-6], or NaN would enter the gradient).
    """
    alpha = jnp.clip(jnp.asarray(alpha, student_logp.dtype), 1e-6, 1 - 1e-6)
    dead = (student_logp == -jnp.inf) & (teacher_logp == -jnp.inf)
    p = jnp.where(dead, 0.0, student_logp)  # logaddexp(-inf, -inf) has a NaN gradient
    q = jnp.where(dead, 0.0, teacher_logp)
    m = jnp.logaddexp(p + jnp.log1p(-alpha), q + jnp.log(alpha))
    terms = (1 - alpha) * _relative(p, m) + alpha * _relative(q, m)
    return jnp.where(dead, 0.0, terms)


def divergence_terms(student_logp: Array, teacher_logp: Array, alpha: float) -> Array:
    """Elementwise terms d_v of D_alpha; `alpha` is static and picks one of three formulas."""
    if alpha == 0:
        return forward_kl_terms(student_logp, teacher_logp)
    if alpha == 1:
        return reverse_kl_terms(student_logp, teacher_logp)
    if not 0 < alpha < 1:
        raise ValueError(f"objective.alpha={alpha} is outside [0, 1]")
    return jsd_terms(student_logp, teacher_logp, alpha)


def divergence(
    student_logp: Array, teacher_logp: Array, alpha: float, elem_clip: Array | float = jnp.inf
) -> Array:
    """D_alpha per token: sum over the last axis of min(d_v, elem_clip).

    The clip acts on the signed terms before the sum (OPSD), so a clipped value may be negative.
    """
    return clamp_max(divergence_terms(student_logp, teacher_logp, alpha), elem_clip).sum(-1)


def add_tail_bucket(logp_k: Array) -> Array:
    """Appends the log of the mass outside the k entries: [..., K] -> [..., K+1].

    S = min(logsumexp, -1e-7), tail = log(-expm1(S)): the bucket never holds less than 1e-7, on the
    student's and the teacher's side alike, and has no gradient there.
    """
    covered = clamp_max(jax.nn.logsumexp(logp_k, -1, keepdims=True), -TAIL_FLOOR)
    return jnp.concatenate([logp_k, jnp.log(-jnp.expm1(covered))], -1)


def renormalise(logp_k: Array) -> Array:
    """Log-probabilities renormalised to sum to 1 over the k entries."""
    return logp_k - jax.nn.logsumexp(logp_k, -1, keepdims=True)


def close_support(logp_k: Array, tail: bool) -> Array:
    """A distribution from the k gathered log-probabilities: with a tail bucket, or renormalised."""
    return add_tail_bucket(logp_k) if tail else renormalise(logp_k)


def entropy(logits: Array, log_z: Array | None = None) -> Array:
    """-sum_v p_v log p_v of softmax(logits) over the last axis; -inf logits count as zero mass."""
    log_z = log_sum_exp(logits) if log_z is None else log_z
    p = jnp.exp(logits - log_z[..., None])
    return log_z - jnp.where(p > 0, p * logits, 0.0).sum(-1)
