"""The vocabulary head and the loss, chunk by chunk, with the gradient in the same pass.

For each chunk of response slots: student logits, teacher logits, loss, d loss / d logits, and from
that the gradient of the hidden states and of the head weight. Nothing of size slots x vocabulary
survives a chunk, and no logits are computed twice: three matrix products for the student, one for
each teacher. The number of chunks is a run-time value, so empty slots at the end of the rows are
not computed. What the loss is, `objectives.token_loss` says; this file only feeds it.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sdjax.objectives.objective import Knobs, ObjectiveConfig, Slots, token_loss
from sdjax.parallel import constrain
from sdjax.types import Array

CHUNK_BYTES = 160 * 2**20  # float32 logits of one chunk on the CPU: 256 tokens of 152k entries
CHUNK_BYTES_ACCELERATOR = 512 * 2**20  # larger matrix products keep the units busy
MIN_SLOTS = 8
# Entries whose logits' gradient a CPU multiplies at a time, from its cache; were it a power of two,
# all rows would compete for the same cache sets.
VOCAB_BLOCK = 4000


@flax.struct.dataclass
class TeacherHead:
    """Teacher hidden states [B, R, D] and head weights [V, D].

    With `other_hidden` the logits are (1 - mix) * teacher + mix * other (trust region): the current
    student's on the teacher's prompt.
    """

    hidden: Array
    weight: Array
    other_hidden: Array | None = None
    other_weight: Array | None = None
    mix: Array | float = 0.0


def chunk_size(rows: int, slots: int, vocab: int, chunk: int = 0, target: int = 0) -> int:
    """Slots per row and chunk: `chunk` when given, else what fits the memory target.

    `target` is in bytes per device (0: the default backend's). Each chunk reads the whole head
    weight, so it should be as large as one device's share of rows and vocabulary allows.
    """
    if chunk:
        return max(1, min(chunk, slots))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = max(1, rows // row_shards())
        vocab = max(1, vocab // mesh.shape["tensor"])
    on_cpu = jax.default_backend() == "cpu"
    target = target or (CHUNK_BYTES if on_cpu else CHUNK_BYTES_ACCELERATOR)
    most = min(slots, max(MIN_SLOTS, target // (4 * vocab * rows)))
    divisors = [n for n in range(most, most // 2, -1) if slots % n == 0]
    if divisors:
        return divisors[0]  # nothing to pad, hence no padded copies of the hidden states
    even = -(-slots // -(-slots // most))  # equal chunks, so that the last is not mostly empty
    return min(slots, -(-even // MIN_SLOTS) * MIN_SLOTS)


def project(hidden_BRD: Array, weight_VD: Array) -> Array:
    """Logits [B, R, V] in float32 (float64 for float64 inputs)."""
    out = jnp.promote_types(hidden_BRD.dtype, jnp.float32)
    weight_VD = weight_VD.astype(hidden_BRD.dtype)
    logits = jnp.einsum("brd,vd->brv", hidden_BRD, weight_VD, preferred_element_type=out)
    return constrain(logits, "B1V")


def teacher_logits(teacher: TeacherHead | None) -> Array | None:
    """Logits of the teacher, mixed with the student's for a trust-region teacher."""
    if teacher is None:
        return None
    logits = project(teacher.hidden, teacher.weight)
    if teacher.other_hidden is None:
        return logits
    return logits + teacher.mix * (project(teacher.other_hidden, teacher.other_weight) - logits)


def row_shards() -> int:
    """Over how many devices the rows of a batch are spread, on the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def _add_gradients(
    dlogits_BRV: Array, hidden_BRD: Array, weight_VD: Array, dweight_SVD: Array
) -> tuple[Array, Array]:
    """Gradient of the hidden states [B, R, D], and `dweight_SVD` plus that of the head weight.

    In float32 or wider. Each of the S shards of rows adds up its own part: one sum over devices
    follows after the last chunk, where a sum per chunk would cost as much time as the chunk itself.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return _add_gradients_whole(dlogits_BRV, hidden_BRD, weight_VD, dweight_SVD)
    return jax.lax.platform_dependent(
        dlogits_BRV,
        hidden_BRD,
        weight_VD,
        dweight_SVD,
        cpu=_add_gradients_by_blocks,
        default=_add_gradients_whole,
    )


def _add_gradients_whole(dlogits_BRV, hidden_BRD, weight_VD, dweight_SVD):
    """`_add_gradients` as two products over the whole vocabulary."""
    shards = len(dweight_SVD)
    product = functools.partial(jnp.einsum, preferred_element_type=dweight_SVD.dtype)
    dhidden_BRD = product("brv,vd->brd", dlogits_BRV, weight_VD)
    if shards == 1:
        dweight = product("brv,brd->vd", dlogits_BRV, hidden_BRD)[None]
    else:
        split = lambda x: x.reshape(shards, x.shape[0] // shards, *x.shape[1:])
        dweight = product("sbrv,sbrd->svd", split(dlogits_BRV), split(hidden_BRD))
        dweight = constrain(dweight, "BV1")
    return dhidden_BRD, dweight_SVD + dweight


def _add_gradients_by_blocks(dlogits_BRV, hidden_BRD, weight_VD, dweight_SVD):
    """`_add_gradients` block by block of the vocabulary, for one CPU.

    Its matrix products pack their operands anew at each call and do not block long sums, so that
    whole products are a sixth slower and need the space of two more head weights.
    """
    V = weight_VD.shape[0]
    block = min(VOCAB_BLOCK, V)

    def add(start: Array | int, size: int, dhidden: Array, dweight: Array) -> tuple[Array, Array]:
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        more, new = _add_gradients_whole(
            cut(dlogits_BRV, 2), hidden_BRD, cut(weight_VD, 0), cut(dweight, 1)
        )
        return dhidden + more, jax.lax.dynamic_update_slice_in_dim(dweight, new, start, 1)

    carry = jnp.zeros(hidden_BRD.shape, dweight_SVD.dtype), dweight_SVD
    carry = jax.lax.fori_loop(0, V // block, lambda i, c: add(i * block, block, *c), carry)
    return add(V - V % block, V % block, *carry) if V % block else carry


def _slice(tree: Any, start: Array, size: int) -> Any:
    """Slots [start, start + size) of every [B, R, ...] array of the tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1), tree)


def _slice_teacher(teacher: TeacherHead | None, start: Array, size: int) -> TeacherHead | None:
    """The same for the hidden states of a teacher; its weights stay whole."""
    if teacher is None:
        return None
    cut = functools.partial(_slice, start=start, size=size)
    return teacher.replace(hidden=cut(teacher.hidden), other_hidden=cut(teacher.other_hidden))


def _prepare_teacher(teacher: TeacherHead, extra: int, dtype: Any) -> TeacherHead:
    """Pads the slots and gathers the weights in the computing dtype, both once."""
    whole = lambda w: None if w is None else constrain(w.astype(dtype), "V1")
    return teacher.replace(
        hidden=_pad(teacher.hidden, extra),
        other_hidden=_pad(teacher.other_hidden, extra),
        weight=whole(teacher.weight),
        other_weight=whole(teacher.other_weight),
    )


def _pad(tree: Any, extra: int) -> Any:
    """Appends `extra` zero slots to every [B, R, ...] array."""
    pad = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
    return jax.tree.map(pad, tree) if extra else tree


def _measured_shapes(
    hidden: Array, weight: Array, teacher: TeacherHead | None, slots: Slots, config, knobs
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and dtypes of what `token_loss` measures, without computing it."""

    def measure(hidden, weight, teacher, slots, knobs):
        return token_loss(project(hidden, weight), teacher_logits(teacher), slots, config, knobs)[1]

    return jax.eval_shape(measure, hidden, weight, teacher, slots, knobs)


def _loop(
    hidden_BRD: Array,
    weight_VD: Array,
    teacher: TeacherHead | None,
    slots: Slots,
    used: Array,
    knobs: Knobs,
    config: ObjectiveConfig,
    chunk: int,
    with_grad: bool,
) -> tuple[Array, dict[str, Array], Array | None, Array | None]:
    """(loss, measurements [B, R], gradient of hidden, gradient of the weight)."""
    B, R, D = hidden_BRD.shape
    extra = -R % chunk
    hidden, slots = _pad(hidden_BRD, extra), _pad(slots, extra)
    if teacher is not None:
        teacher = _prepare_teacher(teacher, extra, hidden.dtype)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    shapes = _measured_shapes(hidden, weight_VD, teacher, slots, config, knobs)
    seen = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    weight = constrain(weight_VD.astype(hidden.dtype), "V1")  # gathered once, not in every chunk
    shards = row_shards() if B % row_shards() == 0 else 1
    grads = ()
    if with_grad:
        dweight = constrain(jnp.zeros((shards, *weight.shape), dtype), "BV1")
        grads = (jnp.zeros(hidden.shape, dtype), dweight)

    def body(i: Array, carry: tuple) -> tuple:
        loss, seen, grads = carry
        start = i * chunk
        part = _slice(slots, start, chunk)
        hidden_part = _slice(hidden, start, chunk)
        target = teacher_logits(_slice_teacher(teacher, start, chunk))

        def chunk_loss(logits: Array) -> tuple[Array, dict[str, Array]]:
            loss_BR, measured = token_loss(logits, target, part, config, knobs)
            return loss_BR.sum(), measured

        logits = project(hidden_part, weight)
        if with_grad:
            (value, measured), dlogits = jax.value_and_grad(chunk_loss, has_aux=True)(logits)
            dlogits = constrain(dlogits, "B1V").astype(hidden.dtype)
            dhidden, dweight = grads
            d, dweight = _add_gradients(dlogits, hidden_part, weight, dweight)
            grads = (jax.lax.dynamic_update_slice_in_dim(dhidden, d, start, 1), dweight)
        else:
            value, measured = chunk_loss(logits)
        seen = {
            name: jax.lax.dynamic_update_slice_in_dim(seen[name], measured[name], start, 1)
            for name in seen
        }
        return loss + value, seen, grads

    count = jnp.minimum(-(-used // chunk), (R + extra) // chunk)
    loss, seen, grads = jax.lax.fori_loop(0, count, body, (jnp.zeros((), dtype), seen, grads))
    seen = {name: x[:, :R] for name, x in seen.items()}
    if not with_grad:
        return loss, seen, None, None
    return loss, seen, grads[0][:, :R], grads[1].sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def head_loss(
    hidden_BRD: Array,
    weight_VD: Array,
    teacher: TeacherHead | None,
    slots: Slots,
    used: Array,
    knobs: Knobs,
    config: ObjectiveConfig,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    """Sum of the weighted token losses, and the measurements of `token_loss` as [B, R] arrays.

    `hidden_BRD` are the hidden states that predict the slots; `used` is the number of leading slots
    that any row fills (chunks beyond it are skipped, their measurements are 0). Differentiable in
    `hidden_BRD` and `weight_VD`, once: the gradient is computed with the value.
    """
    return _loop(hidden_BRD, weight_VD, teacher, slots, used, knobs, config, chunk, False)[:2]


def _forward(hidden_BRD, weight_VD, teacher, slots, used, knobs, config, chunk):
    loss, seen, dhidden, dweight = _loop(
        hidden_BRD, weight_VD, teacher, slots, used, knobs, config, chunk, True
    )
    return (loss, seen), (dhidden.astype(hidden_BRD.dtype), dweight.astype(weight_VD.dtype))


def _backward(config, chunk, residuals, cotangents):
    dhidden, dweight = residuals
    scale = cotangents[0]
    return (
        dhidden * scale.astype(dhidden.dtype),
        dweight * scale.astype(dweight.dtype),
        None,
        None,
        None,
        None,
    )


head_loss.defvjp(_forward, _backward)
