"""Axis letters and the arrays that travel between modules.

    B rows            T tokens of a row     R response slots of a row    S keys / cache slots
    V vocabulary      K top-k support       D model width                H query heads
    N key-value heads C channels per head   F feed-forward width         L layers
    G group           P problems            A accumulation micro-batches

One letter per axis, so suffixes concatenate: `logits_BTV`, `teacher_logp_BRK`, `w_q_LDHC`.
Student and teacher line up on R, never on T.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Array = jax.Array
Params = Any  # pytree of arrays, see sdjax.models.decoder


@flax.struct.dataclass
class PackedRows:
    """Token rows of one model: several sequences per row.

    `segment_ids` is 0 on padding and counts from 1 within a row; `positions` restart at 0 with each
    sequence. All int32 [A, B, T].
    """

    tokens: Array
    segment_ids: Array
    positions: Array


@flax.struct.dataclass
class PackedBatch:
    """The mini-batch of one optimizer step, cut into A micro-batches (docs/design.md).

    `student` [A, B, T] and `teacher` [A, B, T'] (None when the objective has no teacher); row b of
    both holds the same responses. Per response slot, all [A, B, R]: `targets` int32 the response
    token; `student_index`, `teacher_index` int32 where in the row the hidden state that predicts it
    sits; `mask` bool, true on real slots; `weight` float32, the aggregation weight of the policy
    term and `distill_weight` that of the distillation term (both already divided by the normaliser
    of the whole mini-batch, so micro-batches and devices only sum); `advantage` float32;
    `sampler_logp`, `old_logp` float32 and `ref_logp` (log-probabilities under the initial policy,
    None when nothing asks for them); `position` int32, the token's place within its response.
    """

    student: PackedRows
    teacher: PackedRows | None
    targets: Array
    student_index: Array
    teacher_index: Array
    mask: Array
    weight: Array
    distill_weight: Array
    advantage: Array
    sampler_logp: Array
    old_logp: Array
    position: Array
    ref_logp: Array | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step, and all that a checkpoint must hold.

    `params` are the trained parameters (float32 masters; the adapters alone under LoRA), `frozen`
    the parameters that are not trained (None without LoRA), `teacher_params` the teacher's copy
    (None when the teacher is the live student or absent), `skipped` how many updates in a row were
    skipped because a gradient was not finite.
    """

    step: Array
    params: Params
    frozen: Params
    teacher_params: Params
    opt_state: Any
    skipped: Array
