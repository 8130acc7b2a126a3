"""The one parametrised objective: what each token contributes, added up from a config.

Per token, with everything of the teacher and every importance weight free of gradient:

    A'  = modulate(A, u)                                        u = log q(y) - log p(y)
    pg  = dualclip(A', exp(s - s_old)) * w
    d   = min( sum_v min(d_v, elem_clip), token_clip ) * min(exp(s - s_old), is_clip) * w
    l   = W_pg (pg_coef pg + kl_coef KL(s, s_ref) - entropy_coef H(p))
        + W_d direction distill_coef d

W_pg and W_d carry masks and normalisers (`aggregation.py`), so losses of chunks, micro-batches and
devices only add. Nothing here knows parameters, meshes or how the logits came about; each function
works on any chunk of response slots. Layout: METHODS section 9. Routing by reward (SRPO), per-token
advantages computed on the host (RLCSD) and context choice live in the weights and advantages.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sdjax.objectives import advantages, divergence, policy_gradient
from sdjax.objectives.distribution import Distribution
from sdjax.objectives.topk import top_k_ids
from sdjax.types import Array

SUPPORTS = ("full", "student_topk", "teacher_topk", "sampled")


@flax.struct.dataclass
class Knobs:
    """The traced numbers of the objective: schedules and gates change them without recompiling."""

    pg_coef: Array | float
    distill_coef: Array | float
    kl_coef: Array | float
    entropy_coef: Array | float
    direction: Array | float
    elem_clip: Array | float
    token_clip: Array | float
    is_clip: Array | float
    rollout_is_clip: Array | float
    clip_low: Array | float
    clip_high: Array | float
    dual_clip: Array | float
    mod_lam: Array | float
    mod_eps_w: Array | float
    temperature: Array | float


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Everything that defines the objective; hashable, so it can be a static argument.

    Static fields decide the shape of the computation and the compile key; the others are the
    initial values of `Knobs` and of the host-side weights. A term whose coefficient is 0 here is
    left out when the step is traced, so a schedule cannot bring it back.
    """

    # static: which computation
    support: str = "student_topk"  # full, student_topk, teacher_topk, sampled
    distillation_topk: int = 100  # K of the two top-k supports
    add_tail: bool = True  # one bucket for the mass outside the top k; False renormalises
    alpha: float = 0.5  # 0 forward KL, 1 reverse KL, between JSD
    kl_estimator: str = "k3"  # k1, abs, k2, k3
    mod: str = "none"  # advantage modulation by the teacher: none, add_u, anti_phi, mult_rlsd
    with_entropy: bool = True  # measure both entropies (one more pass over the vocabulary)
    # traced: see Knobs
    pg_coef: float = 0.0
    distill_coef: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    direction: float = 1.0  # +1 towards the teacher, -1 away from it
    elem_clip: float = math.inf  # of each signed term d_v, before the vocabulary sum (OPSD)
    token_clip: float = math.inf  # of the whole token's divergence
    is_clip: float = 2.0  # cap of exp(s - s_old) in distillation; inf = no ratio at all
    rollout_is_clip: float = 2.0  # cap of exp(s_old - s_sampler) on both terms; inf = no weight
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 3.0  # inf = off
    mod_lam: float = 0.5
    mod_eps_w: float = 0.2
    temperature: float = 1.0  # both logits are divided by the sampling temperature
    # host: masks, weights, advantages
    loss_agg: str = "rows-incl-masked"
    norm_n: float = 0.0  # divisor of the fixed aggregations; 0 = padded length
    microbatch: int = 0  # normalise within so many rows and average (what accumulation does)
    skip_first: int = 0
    prefix_len: int = 0
    rollout_is_level: str = "token"
    rollout_is_normalize: bool = False
    norm_adv_by_std: bool = False
    adv_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(
                f"objective.support={self.support!r} is unknown: use one of {', '.join(SUPPORTS)}"
            )
        if self.support == "sampled" and self.distill_coef and self.alpha != 1:
            raise ValueError(
                f"objective.support='sampled' estimates the reverse KL only, but objective.alpha "
                f"is {self.alpha}: set alpha=1 or another support"
            )

    @property
    def uses_policy(self) -> bool:
        """Whether the policy-gradient term is compiled in."""
        return self.pg_coef != 0

    @property
    def uses_distillation(self) -> bool:
        """Whether the divergence from the teacher is compiled in."""
        return self.distill_coef != 0

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher forward pass is needed at all."""
        return self.uses_distillation or (self.uses_policy and self.mod != "none")

    def knobs(self) -> Knobs:
        """The traced numbers at their configured values (Python floats)."""
        return Knobs(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Knobs)})

    @classmethod
    def from_config(cls, c: Any) -> ObjectiveConfig:
        """From the sections `objective` and `sampling` of the run's config."""
        shared = {f.name for f in dataclasses.fields(cls)} & set(c.objective.keys())
        fields = {name: c.objective[name] for name in shared}
        if c.sampling.temperature > 0:
            fields["temperature"] = c.sampling.temperature
        return cls(**fields)

    @classmethod
    def from_reference(cls, source: str, params: dict[str, Any] | None = None) -> ObjectiveConfig:
        """From another codebase's name and parameter spellings; see `reference.py`."""
        from sdjax.objectives import reference

        return cls(**reference.fields(source, params or {}))


@flax.struct.dataclass
class Slots:
    """What is known of each response token of a chunk; arrays of one shape, None where unknown.

    `weight` and `distill_weight` are 0 outside the masks. `old_logp` None means that this is the
    first update on the batch: the old policy is the current one, without gradient.
    """

    targets: Array
    weight: Array
    distill_weight: Array
    advantage: Array | None = None
    old_logp: Array | None = None
    sampler_logp: Array | None = None
    ref_logp: Array | None = None
    rollout_weight: Array | None = None  # given instead of computed from sampler_logp


def support_logp(
    student: Distribution, teacher: Distribution, config: ObjectiveConfig
) -> tuple[Array, Array]:
    """Log-probabilities of both on the support of the divergence, [..., K'].

    Gathered entries are normalised over the full vocabulary, then closed by a tail bucket or
    renormalised. The ids are the student's own (or the teacher's) and carry no gradient.
    """
    if config.support == "full":
        return student.logp(), teacher.logp()
    chooser = teacher if config.support == "teacher_topk" else student
    ids = top_k_ids(chooser.logits, config.distillation_topk)
    close = functools.partial(divergence.close_support, tail=config.add_tail)
    return close(student.logp_at(ids)), close(teacher.logp_at(ids))


def distill_terms(
    student: Distribution,
    teacher: Distribution,
    student_logp: Array,
    teacher_logp: Array,
    config: ObjectiveConfig,
    knobs: Knobs,
) -> Array:
    """Divergence per token on the configured support, after its clips and before any weight.

    Support "sampled" is sg(s - r) s: its gradient estimates the reverse KL's, its value means
    nothing. `student_logp` and `teacher_logp` are those of the sampled tokens.
    """
    if config.support == "sampled":
        terms = jax.lax.stop_gradient(student_logp - teacher_logp) * student_logp
    else:
        pair = support_logp(student, teacher, config)
        terms = divergence.divergence(*pair, config.alpha, knobs.elem_clip)
    return divergence.clamp_max(terms, knobs.token_clip)


def policy_terms(
    logp: Array, u: Array | None, slots: Slots, config: ObjectiveConfig, knobs: Knobs
) -> tuple[Array, dict[str, Array]]:
    """Clipped policy-gradient loss per token with modulated advantage, before any weight."""
    advantage = advantages.modulate(
        slots.advantage, u, config.mod, knobs.mod_lam, knobs.mod_eps_w
    ).astype(logp.dtype)
    old = jax.lax.stop_gradient(logp) if slots.old_logp is None else slots.old_logp
    return policy_gradient.ppo_terms(
        logp, old, advantage, knobs.clip_low, knobs.clip_high, knobs.dual_clip
    )


def sampler_weight(
    logp: Array, slots: Slots, config: ObjectiveConfig, knobs: Knobs
) -> Array | None:
    """Token-level truncated importance weight against the sampler, or None when there is none."""
    if slots.rollout_weight is not None:
        return slots.rollout_weight
    if slots.sampler_logp is None or not math.isfinite(config.rollout_is_clip):
        return None
    old = logp if slots.old_logp is None else slots.old_logp
    return policy_gradient.ratio_weight(old, slots.sampler_logp, knobs.rollout_is_clip)


def token_loss(
    student_logits: Array,
    teacher_logits: Array | None,
    slots: Slots,
    config: ObjectiveConfig,
    knobs: Knobs,
) -> tuple[Array, dict[str, Array]]:
    """Weighted loss per slot, and what was measured on the way (unweighted, without gradient).

    Logits are [..., V] before temperature; arithmetic is float32 or wider. `teacher_logits` may be
    None when the objective has no teacher.
    """
    student = Distribution.of(student_logits, knobs.temperature)
    logp = student.logp_at(slots.targets[..., None])[..., 0]
    seen: dict[str, Array] = {"student_logp": logp}
    teacher = u = teacher_logp = None
    if config.uses_teacher:
        teacher = Distribution.of(jax.lax.stop_gradient(teacher_logits), knobs.temperature)
        teacher_logp = teacher.logp_at(slots.targets[..., None])[..., 0]
        seen["teacher_logp"] = teacher_logp
        # whoever has no teacher keeps its advantage: there the logits are of nothing
        u = jnp.where(slots.distill_weight > 0, teacher_logp - logp, 0.0)
    if config.with_entropy or config.entropy_coef:
        seen["student_entropy"] = student.entropy()
        if config.uses_teacher:
            seen["teacher_entropy"] = teacher.entropy()
    loss = jnp.zeros_like(logp)
    sampler = sampler_weight(logp, slots, config, knobs)
    if config.uses_distillation:
        terms = distill_terms(student, teacher, logp, teacher_logp, config, knobs)
        seen["divergence"] = terms
        if slots.old_logp is not None and math.isfinite(config.is_clip):
            terms = terms * policy_gradient.ratio_weight(logp, slots.old_logp, knobs.is_clip)
        terms = terms if sampler is None else terms * sampler
        seen["distill_loss"] = terms
        loss += slots.distill_weight * knobs.direction * knobs.distill_coef * terms
    if config.uses_policy:
        terms, flags = policy_terms(logp, u, slots, config, knobs)
        terms = terms if sampler is None else terms * sampler
        seen |= {"policy_loss": terms, "clip": flags["clip"], "dual": flags["dual"]}
        loss += slots.weight * knobs.pg_coef * terms
    if config.kl_coef:
        penalty = policy_gradient.kl_penalty(logp, slots.ref_logp, config.kl_estimator)
        seen["kl"] = penalty
        loss += slots.weight * knobs.kl_coef * penalty
    if config.entropy_coef:
        loss -= slots.weight * knobs.entropy_coef * seen["student_entropy"]
    return loss, jax.tree.map(jax.lax.stop_gradient, seen)
