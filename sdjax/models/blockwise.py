"""Flash attention in plain XLA: one scan over pairs of blocks with a running softmax.

Memory is a block of scores plus arrays of the size of q, forward and backward; pairs of blocks that
no query sees are skipped while running. See Dao et al., https://arxiv.org/abs/2205.14135,
algorithms 1 and 4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.types import Array

BLOCK = 128  # tokens of a query or key block; of 128, 256, 512 the fastest on a CPU
MASKED = -1e30  # finite, so that a fully masked block gives no NaN in exp(score - max)
F32 = {"preferred_element_type": jnp.float32}


def visible(query_index, key_index, query_segment, key_segment, window: int | None) -> Array:
    """Whether a query may see a key: not later, same segment, within the window."""
    ok = (key_index <= query_index) & (key_segment == query_segment)
    return ok if window is None else ok & (query_index - key_index < window)


def blockwise_attention(
    q_BTHC,
    k_BSNC,
    v_BSNC,
    q_segment_BT,
    kv_segment_BS,
    q_offset=0,
    *,
    window: int | None = None,
    block: int = BLOCK,
) -> Array:
    """Causal attention within segments; `q_offset`, the index of the first query, may be traced.

    Pads T and S to whole blocks, queries with segment -1 and keys with -2, so that nothing sees
    them.
    """
    T, S = q_BTHC.shape[1], k_BSNC.shape[1]
    pairs = _block_pairs(T, S, block, q_offset, window)

    def pad(x, size, value=0):
        extra = -size % block
        return jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)), constant_values=value)

    out = _attend(
        pad(q_BTHC, T),
        pad(k_BSNC, S),
        pad(v_BSNC, S),
        pad(q_segment_BT, T, -1),
        pad(kv_segment_BS, S, -2),
        jnp.asarray(q_offset, jnp.int32),
        _Static(pairs, window, block),
    )
    return out[:, :T]


class _Static:
    """What is known while tracing, hashable by content as jax wants it."""

    def __init__(self, pairs: tuple[tuple[int, int], ...], window: int | None, block: int):
        self.pairs, self.window, self.block = pairs, window, block

    def _key(self):
        return self.pairs, self.window, self.block

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return isinstance(other, _Static) and self._key() == other._key()


def _block_pairs(T, S, block: int, q_offset, window: int | None) -> tuple[tuple[int, int], ...]:
    """(query block, key block) pairs that causality and window leave; all if q_offset is traced."""
    pairs = []
    for i in range(-(-T // block)):
        for j in range(-(-S // block)):
            if isinstance(q_offset, int):
                first, last = q_offset + i * block, q_offset + (i + 1) * block - 1
                if j * block > last:
                    continue
                if window is not None and (j + 1) * block - 1 <= first - window:
                    continue
            pairs.append((i, j))
    return tuple(pairs)


def _needed(pairs: np.ndarray, q_segment_BT, kv_segment_BS, q_offset, static: _Static) -> Array:
    """Whether any query of a pair of blocks may see a key of it in any row, bool [pairs].

    Two blocks that share a segment have overlapping ranges of ids, whatever their order.
    """
    block, window = static.block, static.window

    def ranges(ids):
        ids = ids.reshape(ids.shape[0], -1, block)
        return jnp.min(ids, axis=2), jnp.max(ids, axis=2)

    i, j = pairs[:, 0], pairs[:, 1]
    q_low, q_high = ranges(q_segment_BT)
    k_low, k_high = ranges(kv_segment_BS)
    overlap = (q_low[:, i] <= k_high[:, j]) & (k_low[:, j] <= q_high[:, i])
    first = q_offset + i * block
    inside = j * block <= first + block - 1
    if window is not None:
        inside &= (j + 1) * block - 1 > first - window
    return jnp.any(overlap, axis=0) & inside


def _cut(x: Array, i: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _add(x: Array, update: Array, i: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, i, block, axis) + update, i * block, axis)


def _scores(q_block, k_block, q_segment_BT, kv_segment_BS, q_offset, i, j, static: _Static):
    """Masked, scaled float32 scores of one pair of blocks [B, N, G, t, s], and the mask."""
    block = static.block
    seen_Bts = visible(
        (q_offset + i * block + jnp.arange(block))[None, :, None],
        (j * block + jnp.arange(block))[None, None, :],
        _cut(q_segment_BT, i, block, 1)[:, :, None],
        _cut(kv_segment_BS, j, block, 1)[:, None, :],
        static.window,
    )
    seen = seen_Bts[:, None, None]
    score = jnp.einsum("bngtc,bnsc->bngts", q_block, k_block, **F32)
    return jnp.where(seen, score * q_block.shape[-1] ** -0.5, MASKED), seen


def _heads_first(q_BTHC, k_BSNC, v_BSNC):
    """q [B, N, G, T, C], k and v [B, N, S, C]: blocks then are products without transposition."""
    B, T, H, C = q_BTHC.shape
    N = k_BSNC.shape[2]
    q = q_BTHC.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4)
    return q, k_BSNC.transpose(0, 2, 1, 3), v_BSNC.transpose(0, 2, 1, 3)


def _tokens_first(x_BNGTC):
    B, N, G, T, C = x_BNGTC.shape
    return x_BNGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, N * G, C)


def _scan_pairs(update, carry, q_segment_BT, kv_segment_BS, q_offset, static: _Static):
    """Runs `update(carry, i, j)` over the pairs of blocks that are needed."""
    pairs = np.asarray(static.pairs, np.int32)
    needed = _needed(pairs, q_segment_BT, kv_segment_BS, q_offset, static)

    def body(carry, xs):
        i, j, need = xs
        return jax.lax.cond(need, lambda c: update(c, i, j), lambda c: c, carry), None

    return jax.lax.scan(body, carry, (pairs[:, 0], pairs[:, 1], needed))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset, static: _Static):
    return _forward(q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset, static)[0]


def _forward(q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset, static: _Static):
    q, k, v = _heads_first(q_BTHC, k_BSNC, v_BSNC)
    block = static.block

    def update(carry, i, j):
        out, top, total = carry
        q_block, k_block, v_block = _cut(q, i, block, 3), _cut(k, j, block, 2), _cut(v, j, block, 2)
        score, seen = _scores(q_block, k_block, q_segment_BT, kv_segment_BS, q_offset, i, j, static)
        old_top = _cut(top, i, block, 3)
        new_top = jnp.maximum(old_top, jnp.max(score, axis=-1))
        # where, not only exp: in a row that is masked throughout, score - max is 0.
        prob = jnp.where(seen, jnp.exp(score - new_top[..., None]), 0.0)
        decay = jnp.exp(old_top - new_top)
        new_total = _cut(total, i, block, 3) * decay + jnp.sum(prob, axis=-1)
        part = jnp.einsum("bngts,bnsc->bngtc", prob.astype(v.dtype), v_block, **F32)
        new_out = _cut(out, i, block, 3) * decay[..., None] + part
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=3)
        start = i * block
        return put(out, new_out, start), put(top, new_top, start), put(total, new_total, start)

    carry = (
        jnp.zeros_like(q, jnp.float32),
        jnp.full_like(q[..., 0], MASKED, jnp.float32),
        jnp.zeros_like(q[..., 0], jnp.float32),
    )
    out, top, total = _scan_pairs(update, carry, q_segment_BT, kv_segment_BS, q_offset, static)
    total = jnp.where(total > 0, total, 1.0)  # padding queries, which see nothing
    out_BTHC = _tokens_first(out / total[..., None]).astype(q_BTHC.dtype)
    log_total = top + jnp.log(total)
    return out_BTHC, (
        q_BTHC,
        k_BSNC,
        v_BSNC,
        q_segment_BT,
        kv_segment_BS,
        q_offset,
        out_BTHC,
        log_total,
    )


def _backward(static: _Static, saved, d_out_BTHC):
    q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset, out_BTHC, log_total = saved
    q, k, v = _heads_first(q_BTHC, k_BSNC, v_BSNC)
    d_out = _heads_first(d_out_BTHC, k_BSNC, v_BSNC)[0]
    # sum_s p_ts dp_ts = d_out . out: the row term of softmax's derivative, without the scores.
    row = jnp.sum(d_out_BTHC.astype(jnp.float32) * out_BTHC.astype(jnp.float32), axis=-1)
    row = row.reshape(*row.shape[:2], q.shape[1], q.shape[2]).transpose(0, 2, 3, 1)
    block, scale = static.block, q.shape[-1] ** -0.5

    def update(carry, i, j):
        d_q, d_k, d_v = carry
        q_block, k_block, v_block = _cut(q, i, block, 3), _cut(k, j, block, 2), _cut(v, j, block, 2)
        d_out_block = _cut(d_out, i, block, 3)
        score, seen = _scores(q_block, k_block, q_segment_BT, kv_segment_BS, q_offset, i, j, static)
        prob = jnp.where(seen, jnp.exp(score - _cut(log_total, i, block, 3)[..., None]), 0.0)
        d_prob = jnp.einsum("bngtc,bnsc->bngts", d_out_block, v_block, **F32)
        d_score = prob * (d_prob - _cut(row, i, block, 3)[..., None]) * scale
        prob, d_score = prob.astype(q.dtype), d_score.astype(q.dtype)
        d_v = _add(d_v, jnp.einsum("bngts,bngtc->bnsc", prob, d_out_block, **F32), j, block, 2)
        d_k = _add(d_k, jnp.einsum("bngts,bngtc->bnsc", d_score, q_block, **F32), j, block, 2)
        d_q = _add(d_q, jnp.einsum("bngts,bnsc->bngtc", d_score, k_block, **F32), i, block, 3)
        return d_q, d_k, d_v

    carry = tuple(jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    d_q, d_k, d_v = _scan_pairs(update, carry, q_segment_BT, kv_segment_BS, q_offset, static)
    d_q = _tokens_first(d_q).astype(q_BTHC.dtype)
    d_k = d_k.transpose(0, 2, 1, 3).astype(k_BSNC.dtype)
    d_v = d_v.transpose(0, 2, 1, 3).astype(v_BSNC.dtype)
    return d_q, d_k, d_v, None, None, None


_attend.defvjp(_forward, _backward)
