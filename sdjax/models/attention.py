"""Causal attention within the segments of a packed row, on every backend.

`segment_attention` chooses between the plain reference, a blockwise XLA version whose memory grows
with T and not with T squared, splash attention (TPU) and cuDNN (GPU). Grouped-query heads, sliding
windows and gradients work in all of them. A token's place is its index in the row: segments must be
contiguous and in order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

IMPLS = ("auto", "reference", "xla")
BLOCK = 256  # tokens of a query or key block; rows up to this long are one block
MASKED = -1e30  # finite, so that a fully masked block gives no NaN in exp(score - max)


def segment_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    window: int | None = None,
    impl: str = "auto",
    block: int = BLOCK,
) -> Float[Array, "B T H C"]:
    """softmax(q k / sqrt(C)) v over the earlier tokens of the same segment.

    Query head h reads key-value head h // (H / N). A token sees itself and the `window` - 1 tokens
    before it. Softmax in float32, output in q's dtype. Padding (segment 0) attends to padding, so
    nothing is NaN there. Raises ValueError for an unknown `impl`.
    """
    if impl not in IMPLS:
        raise ValueError(f"attention implementation {impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl = "xla"
    if impl == "reference" or (impl == "xla" and q_BTHC.shape[1] <= block):
        return reference_attention(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window)
    return _padded_blockwise(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window, block)


def visible(
    query_index: Array,
    key_index: Array,
    query_segment: Array,
    key_segment: Array,
    window: int | None,
) -> Array:
    """Whether a query may see a key: not later, same segment, within the window."""
    ok = (key_index <= query_index) & (key_segment == query_segment)
    return ok if window is None else ok & (query_index - key_index < window)


def reference_attention(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window: int | None = None) -> Array:
    """The definition, with all scores [B, H, T, T] in memory: fastest for short rows."""
    B, T, H, C = q_BTHC.shape
    N = k_BTNC.shape[2]
    q_BTNGC = q_BTHC.reshape(B, T, N, H // N, C)
    score = jnp.einsum("btngc,bsnc->bngts", q_BTNGC, k_BTNC, preferred_element_type=jnp.float32)
    index = jnp.arange(T)
    seen_BTS = visible(
        index[None, :, None],
        index[None, None, :],
        segment_ids_BT[:, :, None],
        segment_ids_BT[:, None, :],
        window,
    )
    score = jnp.where(seen_BTS[:, None, None], score * C**-0.5, MASKED)
    prob = jax.nn.softmax(score, axis=-1).astype(v_BTNC.dtype)
    out = jnp.einsum("bngts,bsnc->btngc", prob, v_BTNC)
    return out.reshape(B, T, H, C).astype(q_BTHC.dtype)


def _padded_blockwise(q, k, v, segment_ids, window, block):
    """Pads T to whole blocks (with segment 0, cut off again) and runs the blockwise version."""
    T = q.shape[1]
    extra = -T % block
    if extra:
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, extra)))
    return _blockwise(q, k, v, segment_ids, window, block)[:, :T]


def _block_pairs(T: int, block: int, window: int | None) -> np.ndarray:
    """(query block, key block) pairs that causality and the window leave, int32 [pairs, 2]."""
    count = T // block
    reach = count if window is None else (window + block - 2) // block
    pairs = [(i, j) for i in range(count) for j in range(max(0, i - reach), i + 1)]
    return np.asarray(pairs, np.int32)


def _pair_is_needed(pairs: np.ndarray, segment_ids_BT: Array, block: int) -> Array:
    """Whether any row has a segment in both blocks of a pair, bool [pairs].

    Two blocks that share an id have overlapping ranges of ids, whatever their order; a diagonal
    pair always overlaps itself, so every token sees at least itself.
    """
    B, T = segment_ids_BT.shape
    ids = segment_ids_BT.reshape(B, T // block, block)
    low = jnp.min(ids, axis=2)
    high = jnp.max(ids, axis=2)
    i, j = pairs[:, 0], pairs[:, 1]
    overlap = (low[:, i] <= high[:, j]) & (low[:, j] <= high[:, i])
    return jnp.any(overlap, axis=0)


def _cut(x: Array, i: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add(x: Array, update: Array, i: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, i, block, axis) + update, i * block, axis)


def _scores(q_block, k_block, segments, i, j, window, block):
    """Masked, scaled float32 scores of one pair of blocks [B, N, G, t, s], and the mask."""
    query_index = i * block + jnp.arange(block)
    key_index = j * block + jnp.arange(block)
    seen_Bts = visible(
        query_index[None, :, None],
        key_index[None, None, :],
        _cut(segments, i, block, 1)[:, :, None],
        _cut(segments, j, block, 1)[:, None, :],
        window,
    )
    score = jnp.einsum("bngtc,bnsc->bngts", q_block, k_block, preferred_element_type=jnp.float32)
    seen = seen_Bts[:, None, None]
    return jnp.where(seen, score * q_block.shape[-1] ** -0.5, MASKED), seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blockwise(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window: int | None, block: int):
    """Flash attention in plain XLA: one scan over pairs of blocks with a running softmax.

    Peak memory is one block of scores plus arrays of the size of q. Pairs of blocks that share no
    segment in any row are skipped. See Dao et al., https://arxiv.org/abs/2205.14135, algorithms 1
    and 4.
    """
    return _blockwise_fwd(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window, block)[0]


def _heads_first(q_BTHC, k_BTNC, v_BTNC):
    B, T, H, C = q_BTHC.shape
    N = k_BTNC.shape[2]
    q = q_BTHC.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4)
    return q, k_BTNC.transpose(0, 2, 1, 3), v_BTNC.transpose(0, 2, 1, 3)


def _tokens_first(x_BNGTC):
    B, N, G, T, C = x_BNGTC.shape
    return x_BNGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, N * G, C)


def _blockwise_fwd(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, window, block):
    q, k, v = _heads_first(q_BTHC, k_BTNC, v_BTNC)
    pairs = _block_pairs(q.shape[3], block, window)
    needed = _pair_is_needed(pairs, segment_ids_BT, block)

    def update(carry, i, j):
        out, top, total = carry
        q_block, k_block, v_block = _cut(q, i, block, 3), _cut(k, j, block, 2), _cut(v, j, block, 2)
        score, seen = _scores(q_block, k_block, segment_ids_BT, i, j, window, block)
        old_top = _cut(top, i, block, 3)
        new_top = jnp.maximum(old_top, jnp.max(score, axis=-1))
        # where, not only exp: in a row that is masked throughout, score - max is 0.
        prob = jnp.where(seen, jnp.exp(score - new_top[..., None]), 0.0)
        decay = jnp.exp(old_top - new_top)
        new_total = _cut(total, i, block, 3) * decay + jnp.sum(prob, axis=-1)
        part = jnp.einsum(
            "bngts,bnsc->bngtc", prob.astype(v.dtype), v_block, preferred_element_type=jnp.float32
        )
        new_out = _cut(out, i, block, 3) * decay[..., None] + part
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=3)
        start = i * block
        return put(out, new_out, start), put(top, new_top, start), put(total, new_total, start)

    def body(carry, xs):
        (i, j), need = xs
        return jax.lax.cond(need, lambda c: update(c, i, j), lambda c: c, carry), None

    shape = q.shape[:-1]
    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    (out, top, total), _ = jax.lax.scan(body, carry, ((pairs[:, 0], pairs[:, 1]), needed))
    out_BTHC = _tokens_first(out / total[..., None]).astype(q_BTHC.dtype)
    log_total = top + jnp.log(total)
    return out_BTHC, (q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, out_BTHC, log_total)


def _blockwise_bwd(window, block, saved, d_out_BTHC):
    q_BTHC, k_BTNC, v_BTNC, segment_ids_BT, out_BTHC, log_total = saved
    q, k, v = _heads_first(q_BTHC, k_BTNC, v_BTNC)
    d_out = _heads_first(d_out_BTHC, k_BTNC, v_BTNC)[0]
    # sum_s p_ts dp_ts = d_out . out: the row term of softmax's derivative, without the scores.
    row = jnp.sum(d_out_BTHC.astype(jnp.float32) * out_BTHC.astype(jnp.float32), axis=-1)
    row = row.reshape(*row.shape[:2], q.shape[1], q.shape[2]).transpose(0, 2, 3, 1)
    pairs = _block_pairs(q.shape[3], block, window)
    needed = _pair_is_needed(pairs, segment_ids_BT, block)
    scale = q.shape[-1] ** -0.5
    f32 = {"preferred_element_type": jnp.float32}

    def update(carry, i, j):
        d_q, d_k, d_v = carry
        q_block, k_block, v_block = _cut(q, i, block, 3), _cut(k, j, block, 2), _cut(v, j, block, 2)
        d_out_block = _cut(d_out, i, block, 3)
        score, seen = _scores(q_block, k_block, segment_ids_BT, i, j, window, block)
        prob = jnp.where(seen, jnp.exp(score - _cut(log_total, i, block, 3)[..., None]), 0.0)
        d_prob = jnp.einsum("bngtc,bnsc->bngts", d_out_block, v_block, **f32)
        d_score = prob * (d_prob - _cut(row, i, block, 3)[..., None]) * scale
        prob, d_score = prob.astype(q.dtype), d_score.astype(q.dtype)
        d_v = _add(d_v, jnp.einsum("bngts,bngtc->bnsc", prob, d_out_block, **f32), j, block, 2)
        d_k = _add(d_k, jnp.einsum("bngts,bngtc->bnsc", d_score, q_block, **f32), j, block, 2)
        d_q = _add(d_q, jnp.einsum("bngts,bnsc->bngtc", d_score, k_block, **f32), i, block, 3)
        return d_q, d_k, d_v

    def body(carry, xs):
        (i, j), need = xs
        return jax.lax.cond(need, lambda c: update(c, i, j), lambda c: c, carry), None

    carry = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (d_q, d_k, d_v), _ = jax.lax.scan(body, carry, ((pairs[:, 0], pairs[:, 1]), needed))
    d_q = _tokens_first(d_q).astype(q_BTHC.dtype)
    d_k = d_k.transpose(0, 2, 1, 3).astype(k_BTNC.dtype)
    d_v = d_v.transpose(0, 2, 1, 3).astype(v_BTNC.dtype)
    return d_q, d_k, d_v, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
