"""The compiled train step. One call, for the whole mini-batch of one optimizer update:

1. student forward     hidden states of the packed rows, gathered where a response is predicted
2. teacher forward     the same with other weights and its own prompts, without gradient; left out
                       of the program when the objective has no teacher, and not run for
                       micro-batches in which nobody has one
3. head and loss       chunk by chunk with the gradient in the same pass (`sdjax.head`)
4. accumulate          over the micro-batches that hold something; weights already carry the
                       normaliser of the whole mini-batch, so everything only adds
5. update              clip, AdamW, or nothing when the gradient is not finite
6. measure             masked means and quantiles over all response tokens

The teacher's weights move between batches, not here: `update_teacher`. `make_score` runs stages 1
and 3 without gradient, for old and reference log-probabilities and for analyses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from sdjax import head, measure
from sdjax.compiled import Program
from sdjax.models import decoder, lora
from sdjax.models.config import ModelConfig
from sdjax.objectives.objective import Knobs, ObjectiveConfig, Slots
from sdjax.optimizer import (
    OptimizerConfig,
    apply_gradient,
    learning_rate,
    make_optimizer,
    update_count,
)
from sdjax.parallel import ACT_RULES, replicated, spec
from sdjax.types import Array, PackedBatch, PackedRows, Params, TrainState

TEACHER_KINDS = ("fixed", "ema", "snapshot", "live", "trust_region")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How the step is computed, as opposed to what: hashable, part of the compile key."""

    teacher_kind: str = "ema"  # whose weights the teacher has, one of TEACHER_KINDS
    compute_dtype: str = "float32"  # of matrix-product inputs
    remat: str = "full"  # what the backward pass recomputes per layer: none, dots, full
    attention: str = "auto"
    chunk: int = 0  # response slots per row and head chunk; 0 = chosen from the vocabulary
    words: tuple[str, ...] = ()  # names of the word classes of StepScalars.word_of_token

    def __post_init__(self) -> None:
        if self.teacher_kind not in TEACHER_KINDS:
            raise ValueError(
                f"teacher.kind={self.teacher_kind!r} is unknown: use {', '.join(TEACHER_KINDS)}"
            )

    @classmethod
    def from_config(cls, c: Any, words: tuple[str, ...] = ()) -> StepConfig:
        """From `teacher`, `model` and `objective`; compute_dtype "auto" is bfloat16 off the CPU."""
        dtype = c.model.compute_dtype
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return cls(
            teacher_kind=c.teacher.kind,
            compute_dtype=dtype,
            remat=c.model.remat,
            attention=c.model.attention,
            chunk=c.objective.chunk,
            words=words,
        )


@flax.struct.dataclass
class StepScalars:
    """Traced values of one call: the objective's knobs and what schedules may move.

    `trust_mix` is the student's share in a trust-region teacher's logits. `seed` drives the
    adapters' dropout. `word_of_token` int32 [V] (or None) gives each token's word class, 0 for
    none and i for StepConfig.words[i-1], for the divergence per epistemic word.
    """

    knobs: Knobs
    trust_mix: Array | float = 0.05
    seed: Array | int = 0
    word_of_token: Array | None = None


def has_own_teacher(objective: ObjectiveConfig, kind: str, frozen: Params | None) -> bool:
    """Whether the state holds teacher weights: not if live, absent, or the base under adapters."""
    if not objective.uses_teacher or kind == "live":
        return False
    return frozen is None or kind in ("ema", "snapshot")


def init_state(
    params: Params,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    teacher_kind: str = "ema",
) -> TrainState:
    """The state before the first update: teacher weights are a copy of the initial ones.

    `params` (with adapters when `model_cfg.lora` is set) keep their shardings; moments get those of
    their parameters, counters are replicated. What is trained of `params` is donated: on a CPU,
    loaded arrays belong to numpy and the first step would hold them twice.
    """
    whole = replicated(mesh)
    # what is not yet placed on the mesh would compile the step a second time
    place = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole)
    trained, frozen = lora.split(jax.tree.map(place, params))
    adam = make_optimizer(optimizer)

    def build(trained: Params) -> tuple[Params, Any, Params | None]:
        own = has_own_teacher(objective, teacher_kind, frozen)
        return trained, adam.init(trained), jax.tree.map(jnp.copy, trained) if own else None

    places = jax.tree.map(lambda x: x.sharding, trained)
    _, abstract_opt, abstract_teacher = jax.eval_shape(build, trained)
    opt_places = like_params(abstract_opt, trained, places, whole)
    teacher_places = None if abstract_teacher is None else places
    init = jax.jit(build, donate_argnums=0, out_shardings=(places, opt_places, teacher_places))
    trained, opt_state, teacher = init(trained)
    zero = lambda: jax.device_put(jnp.zeros((), jnp.int32), whole)
    return TrainState(
        step=zero(),
        params=trained,
        frozen=frozen,
        teacher_params=teacher,
        opt_state=opt_state,
        skipped=zero(),
    )


def like_params(opt_state: Any, params: Params, places: Params, whole: NamedSharding) -> Any:
    """Shardings of an optimizer state: subtrees shaped like the parameters follow them."""
    tree = jax.tree.structure(params)
    like = lambda x: jax.tree.structure(x) == tree
    return jax.tree.map(lambda x: places if like(x) else whole, opt_state, is_leaf=like)


def _forward(
    params: Params, rows: PackedRows, cfg: ModelConfig, config: StepConfig, index: Array, key=None
) -> Array:
    """Hidden states [B, R, D] that predict the response slots."""
    hidden_BTD = decoder.hidden_states(
        params,
        rows.tokens,
        rows.segment_ids,
        rows.positions,
        cfg,
        compute_dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        attention_impl=config.attention,
        dropout_key=key,
    )
    return jnp.take_along_axis(hidden_BTD, index[..., None], 1)


def _teacher_hidden(
    params: Params, batch: PackedBatch, cfg: ModelConfig, config: StepConfig
) -> Array:
    """Hidden states on the teacher's prompts; zeros, at no cost, where no row has a teacher."""
    forward = lambda: _forward(params, batch.teacher, cfg, config, batch.teacher_index)
    out = jax.eval_shape(forward)
    nobody = lambda: jnp.zeros(out.shape, out.dtype)
    return jax.lax.cond((batch.teacher.segment_ids > 0).any(), forward, nobody)


def _teacher_head(
    state: TrainState,
    batch: PackedBatch,
    cfg: ModelConfig,
    config: StepConfig,
    scalars: StepScalars,
) -> head.TeacherHead:
    """The teacher's hidden states on its own prompts, all without gradient."""
    config = dataclasses.replace(config, remat="none")  # no backward pass to save memory for
    student = lora.join(state.params, state.frozen)
    params, teacher_cfg = student, cfg
    if state.teacher_params is not None:
        params = lora.join(state.teacher_params, state.frozen)
    elif config.teacher_kind != "live" and state.frozen is not None:
        params, teacher_cfg = state.frozen, lora.without(cfg)
    hidden = _teacher_hidden(params, batch, teacher_cfg, config)
    out = head.TeacherHead(hidden=hidden, weight=decoder.head_weight(params, teacher_cfg))
    if config.teacher_kind == "trust_region":
        other = _teacher_hidden(student, batch, cfg, config)
        weight = decoder.head_weight(student, cfg)
        out = out.replace(other_hidden=other, other_weight=weight, mix=scalars.trust_mix)
    return jax.lax.stop_gradient(out)


def _slots(batch: PackedBatch) -> Slots:
    """What the objective knows of each slot of one micro-batch."""
    return Slots(
        targets=batch.targets,
        weight=batch.weight,
        distill_weight=batch.distill_weight,
        advantage=batch.advantage,
        old_logp=batch.old_logp,
        sampler_logp=batch.sampler_logp,
        ref_logp=batch.ref_logp,
    )


def _used_slots(mask_BR: Array) -> Array:
    """How many leading slots any row fills."""
    return mask_BR.sum(-1).max().astype(jnp.int32)


def _micro_loss(
    trained: Params,
    state: TrainState,
    batch: PackedBatch,
    scalars: StepScalars,
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    config: StepConfig,
    key: Array | None,
) -> tuple[Array, dict[str, Array]]:
    """Loss of one micro-batch [B, ...] and the measurements of its slots [B, R]."""
    teacher = None
    if objective.uses_teacher:
        teacher = _teacher_head(state, batch, cfg, config, scalars)
    params = lora.join(trained, state.frozen)
    hidden = _forward(params, batch.student, cfg, config, batch.student_index, key)
    rows, slots = batch.targets.shape
    return head.head_loss(
        hidden,
        decoder.head_weight(params, cfg),
        teacher,
        _slots(batch),
        _used_slots(batch.mask),
        scalars.knobs,
        objective,
        head.chunk_size(rows, slots, cfg.vocab_size, config.chunk),
    )


def _used_micro_batches(batch: PackedBatch) -> Array:
    """How many leading micro-batches hold something; the others cost nothing."""
    return batch.mask.any((1, 2)).sum()


def _accumulate(state, batch: PackedBatch, scalars, cfg, objective, config):
    """(loss, measurements [A, B, R], gradient) summed over the micro-batches in use."""
    key = None
    if cfg.lora is not None and cfg.lora.dropout > 0:
        key = jax.random.fold_in(jax.random.key(scalars.seed), state.step)

    def one(i: Array | int) -> tuple:
        micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), batch)
        micro_key = None if key is None else jax.random.fold_in(key, i)
        return jax.value_and_grad(_micro_loss, has_aux=True)(
            state.params, state, micro, scalars, cfg, objective, config, micro_key
        )

    A = batch.mask.shape[0]
    if A == 1:
        (loss, seen), grad = one(0)
        return loss, jax.tree.map(lambda x: x[None], seen), grad

    def body(i: Array, carry: tuple) -> tuple:
        loss, seen, grad = carry
        (value, part), g = one(i)
        seen = {k: jax.lax.dynamic_update_index_in_dim(seen[k], part[k], i, 0) for k in seen}
        return loss + value, seen, jax.tree.map(jnp.add, grad, g)

    (loss, seen), grad = jax.eval_shape(lambda: one(0))
    zeros = lambda s, lead=(): jnp.zeros((*lead, *s.shape), s.dtype)
    start = (
        zeros(loss),
        {name: zeros(s, (A,)) for name, s in seen.items()},
        jax.tree.map(zeros, grad),
    )
    return jax.lax.fori_loop(0, _used_micro_batches(batch), body, start)


def _train_step(
    state: TrainState,
    batch: PackedBatch,
    scalars: StepScalars,
    *,
    cfg: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    config: StepConfig,
) -> tuple[TrainState, dict[str, Array]]:
    """The traced step: stages 1 to 6."""
    if objective.kl_coef and batch.ref_logp is None:
        raise ValueError(
            f"objective.kl_coef={objective.kl_coef} needs the initial policy's log-probabilities: "
            "give every response its ref_logp, or set objective.kl_coef=0"
        )
    if batch.teacher is None and objective.uses_teacher:
        # nobody has a teacher in this mini-batch: the distillation term is 0 and so is its gradient
        objective = dataclasses.replace(objective, distill_coef=0.0, mod="none")
    loss, seen, grad = _accumulate(state, batch, scalars, cfg, objective, config)
    params, opt_state, norm, finite = apply_gradient(
        make_optimizer(optimizer), optimizer.clip_norm, grad, state.opt_state, state.params
    )
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    metrics = measure.step_metrics(
        loss, seen, batch, scalars.knobs, scalars.word_of_token, config.words
    )
    metrics |= {
        "optim/grad_norm": norm,
        "optim/lr": learning_rate(optimizer, update_count(state.opt_state)),
        "optim/skipped": 1.0 - finite,
        "optim/skipped_in_a_row": new_state.skipped,
    }
    return new_state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}


class TrainStep:
    """The compiled step: `step(state, batch, scalars) -> (state, metrics)`; donates the state.

    Compiles once per shape of the batch; `compilations` counts them. `lower` takes abstract
    arguments (with shardings) and returns jax's lowered program, for planning without devices.
    """

    def __init__(self, function: Any, mesh: Mesh):
        self._function = function
        self._mesh = mesh
        self._program = None

    def _program_for(self, state: TrainState) -> Program:
        if self._program is None:
            places = jax.tree.map(lambda x: x.sharding, state)
            self._program = Program(
                self._function, donate_argnums=0, out_shardings=(places, replicated(self._mesh))
            )
        return self._program

    def __call__(
        self, state: TrainState, batch: PackedBatch, scalars: StepScalars
    ) -> tuple[TrainState, dict[str, Array]]:
        with jax.set_mesh(self._mesh):
            return self._program_for(state)(state, batch, scalars)

    def lower(self, state: Any, batch: Any, scalars: StepScalars) -> Any:
        """The lowered program for (abstract) arguments."""
        with jax.set_mesh(self._mesh):
            return self._program_for(state).lower(state, batch, scalars)

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return 0 if self._program is None else self._program.compilations


def make_train_step(
    model_cfg: ModelConfig,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    config: StepConfig | None = None,
) -> TrainStep:
    """The compiled train step of one run. Raises ValueError for what the step cannot do."""
    config = config or StepConfig()
    if objective.rollout_is_level != "token" or objective.rollout_is_normalize:
        raise ValueError(
            f"objective.rollout_is_level={objective.rollout_is_level!r} (normalised: "
            f"{objective.rollout_is_normalize}) needs whole responses: the step only knows 'token'"
        )

    def step(state: TrainState, batch: PackedBatch, scalars: StepScalars):
        return _train_step(
            state,
            batch,
            scalars,
            cfg=model_cfg,
            objective=objective,
            optimizer=optimizer,
            config=config,
        )

    return TrainStep(step, mesh)


def make_score(
    model_cfg: ModelConfig,
    mesh: Mesh,
    config: StepConfig | None = None,
    objective: ObjectiveConfig | None = None,
) -> Any:
    """`score(params, batch) -> {"student_logp": [A, B, R], ...}`: no gradient, params not donated.

    Log-probabilities of the response tokens on the *student* rows with any parameters, at the
    temperature of `objective` (1 when None).
    """
    config = config or StepConfig()
    objective = dataclasses.replace(
        objective or ObjectiveConfig(),
        pg_coef=0.0,
        distill_coef=0.0,
        kl_coef=0.0,
        entropy_coef=0.0,
        mod="none",
        with_entropy=False,
    )

    def score(params: Params, batch: PackedBatch) -> dict[str, Array]:
        state = TrainState(0, params, None, None, None, 0)
        scalars = StepScalars(knobs=objective.knobs())

        def one(i: Array | int) -> dict[str, Array]:
            micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), batch)
            return _micro_loss(params, state, micro, scalars, model_cfg, objective, config, None)[1]

        def body(i: Array, seen: dict[str, Array]) -> dict[str, Array]:
            part = one(i)
            return {k: jax.lax.dynamic_update_index_in_dim(seen[k], part[k], i, 0) for k in seen}

        lead = batch.mask.shape[0]
        empty = {k: jnp.zeros((lead, *x.shape), x.dtype) for k, x in jax.eval_shape(one, 0).items()}
        return jax.lax.fori_loop(0, _used_micro_batches(batch), body, empty)

    jitted = jax.jit(score)

    def run(params: Params, batch: PackedBatch) -> dict[str, Array]:
        with jax.set_mesh(mesh):
            return jitted(params, batch)

    return run


def _blend(teacher: Params, student: Params, rate: Array) -> Params:
    return jax.tree.map(lambda t, s: ((1 - rate) * t + rate * s).astype(t.dtype), teacher, student)


_blend_donated = jax.jit(_blend, donate_argnums=0)


def update_teacher(state: TrainState, rate: float) -> TrainState:
    """teacher <- (1 - rate) teacher + rate student, once per training batch; rate 1 copies.

    Does nothing when the state has no teacher weights of its own or `rate` is 0. The old state's
    teacher weights are donated. When every update of the batch was skipped, pass 0.
    """
    if state.teacher_params is None or rate == 0:
        return state
    places = jax.tree.map(lambda x: x.sharding, state.teacher_params)
    teacher = _blend_donated(state.teacher_params, state.params, rate)
    # the same places under the same names, or the step would be compiled again for them
    return state.replace(teacher_params=jax.device_put(teacher, places))


def put_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """Places a packed batch of numpy arrays: rows over data and fsdp, everything else whole.

    On several hosts each passes its own rows, and the global batch has all of them.
    """
    place = NamedSharding(mesh, spec("1B1", ACT_RULES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)
