"""Advantages: within a group of responses (host, numpy) and modulated by the teacher (traced).

Source: METHODS 2 (group advantage, verl's `core_algos.py:267`), 7.1 (AntiSD), 7.2 (RLSD).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.objectives.divergence import clamp
from sdjax.types import Array

MODULATIONS = ("none", "add_u", "anti_phi", "mult_rlsd")


def group_advantage(
    reward: np.ndarray, group: np.ndarray, norm_std: bool = False, eps: float = 1e-6
) -> np.ndarray:
    """A_i = R_i - mean_g, optionally divided by (std_g + eps) with the unbiased std.

    `group` holds each response's group id. A group of one has mean 0 and std 1, so it keeps its raw
    reward; groups of equal rewards get 0 and are kept.
    """
    reward = np.asarray(reward, np.float64)
    advantage = np.empty_like(reward)
    for g in np.unique(group):
        members = np.asarray(group) == g
        scores = reward[members]
        single = scores.size == 1
        centred = scores - (0.0 if single else scores.mean())
        scale = 1.0 if single else scores.std(ddof=1)
        advantage[members] = centred / (scale + eps) if norm_std else centred
    return advantage


def anti_phi(u: Array) -> Array:
    """phi(u) = (softplus(u) - log 2) / 2, the shape of ascent on JSD (AntiSD)."""
    return (jax.nn.softplus(u) - jnp.log(jnp.asarray(2.0, u.dtype))) / 2


def modulate(
    advantage: Array, u: Array | None, kind: str, lam: Array | float, eps_w: Array | float
) -> Array:
    """A' from the advantage and u = log q(y) - log p(y), without gradient.

      none:      A
      add_u:     A + lam u                      (AntiSD's SD baseline; sampled-token distillation)
      anti_phi:  A - lam phi(u)                 (AntiSD)
      mult_rlsd: A ((1-lam) + lam clip(exp(sign(A) u), 1-eps_w, 1+eps_w))   (RLSD)

    Raises ValueError for another kind.
    """
    if kind == "none":
        return advantage
    if kind not in MODULATIONS:
        raise ValueError(f"objective.mod={kind!r} is unknown: use one of {', '.join(MODULATIONS)}")
    u = jax.lax.stop_gradient(u)
    if kind == "add_u":
        return advantage + lam * u
    if kind == "anti_phi":
        return advantage - lam * anti_phi(u)
    evidence = clamp(jnp.exp(jnp.sign(advantage) * u), 1 - eps_w, 1 + eps_w)
    return advantage * ((1 - lam) + lam * evidence)
