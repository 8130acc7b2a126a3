"""Decode attention over pages, for TPUs: JAX's ragged paged attention kernel, and the same in XLA.

Keys and values of a layer lie together, [B, S, 2N, C] with k0, v0, k1, v1 ... along the heads, and
a row's S columns are its pages. The kernel reads only the pages below a row's length, so attention
costs what the tokens that are really there cost, whatever the bucket. Every other backend computes
the same with XLA. A token is written to its page before it is attended to.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sdjax.parallel import ACT_RULES, spec

PAGE = 128  # columns; shorter where the cache length is not a multiple
KEYS_PER_BLOCK = 512
QUERIES_PER_BLOCK = 32
LANES = 128  # the kernel wants head_dim to fill whole registers


def supported(head_dim: int, dtype: str) -> bool:
    """Whether the TPU kernel takes this head size and cache dtype."""
    return head_dim % LANES == 0 and dtype in ("float32", "bfloat16")


def interleave(k_BTNC: Array, v_BTNC: Array) -> Float[Array, "B T 2*N C"]:
    """Keys and values side by side: k0, v0, k1, v1 ..."""
    B, T, N, C = k_BTNC.shape
    return jnp.stack([k_BTNC, v_BTNC], axis=3).reshape(B, T, 2 * N, C)


def write(
    kv_BSNC: Float[Array, "B S 2*N C"],
    k_B1NC: Float[Array, "B 1 N C"],
    v_B1NC: Float[Array, "B 1 N C"],
    place_B: Int[Array, " B"],
) -> Float[Array, "B S 2*N C"]:
    """Writes one token per row to column `place_B`."""
    fresh = interleave(k_B1NC, v_B1NC).astype(kv_BSNC.dtype)
    one = lambda row, new, place: lax.dynamic_update_slice_in_dim(row, new, place, 0)
    return jax.vmap(one)(kv_BSNC, fresh, place_B)


def attend(
    q_B1HC: Float[Array, "B 1 H C"],
    kv_BSNC: Float[Array, "B S 2*N C"],
    length_B: Int[Array, " B"],
    window: int | None,
) -> Float[Array, "B 1 H C"]:
    """Attention of one token per row over the first `length_B` columns, the last `window` of them.

    `length_B` counts the token itself. On a mesh, each device attends for its rows and heads.
    """
    local = functools.partial(_local, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q_B1HC, kv_BSNC, length_B)
    rows = PartitionSpec(ACT_RULES["B"])
    q_spec, kv_spec = spec("B1HC", ACT_RULES), spec("BSNC", ACT_RULES)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(q_spec, kv_spec, rows), out_specs=q_spec, check_vma=False
    )
    return sharded(q_B1HC, kv_BSNC, length_B)


def _local(q_B1HC, kv_BSNC, length_B, window):
    if not supported(q_B1HC.shape[-1], kv_BSNC.dtype.name):
        return attend_xla(q_B1HC, kv_BSNC, length_B, window=window)
    return lax.platform_dependent(
        q_B1HC,
        kv_BSNC,
        length_B,
        tpu=functools.partial(attend_kernel, window=window),
        default=functools.partial(attend_xla, window=window),
    )


def attend_xla(q_B1HC, kv_BSNC, length_B, *, window: int | None):
    """The definition: scores of all columns, softmax in float32."""
    B, _, H, C = q_B1HC.shape
    S, N = kv_BSNC.shape[1], kv_BSNC.shape[2] // 2
    kv_BSNC = kv_BSNC.astype(q_B1HC.dtype)
    q_BNGC = (q_B1HC * C**-0.5).reshape(B, N, H // N, C)
    score_BNGS = jnp.einsum("bngc,bsnc->bngs", q_BNGC, kv_BSNC[:, :, 0::2]).astype(jnp.float32)
    age_BS = length_B[:, None] - 1 - jnp.arange(S)
    seen_BS = age_BS >= 0 if window is None else (age_BS >= 0) & (age_BS < window)
    score_BNGS = jnp.where(seen_BS[:, None, None], score_BNGS, -jnp.inf)
    prob_BNGS = jax.nn.softmax(score_BNGS, axis=-1).astype(q_B1HC.dtype)
    out = jnp.einsum("bngs,bsnc->bngc", prob_BNGS, kv_BSNC[:, :, 1::2])
    return out.reshape(B, 1, H, C)


def attend_kernel(q_B1HC, kv_BSNC, length_B, *, window: int | None):
    """JAX's Pallas kernel; every row is a sequence with one query."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as rpa

    B, _, H, C = q_B1HC.shape
    S = kv_BSNC.shape[1]
    page = next(size for size in (PAGE, 64, 32, 16, 8, 1) if S % size == 0)
    pages = jnp.arange(B * S // page, dtype=jnp.int32).reshape(B, S // page)
    out_BHC = rpa.ragged_paged_attention(
        q_B1HC.reshape(B, H, C),
        kv_BSNC.reshape(B * S // page, page, *kv_BSNC.shape[2:]),
        length_B.astype(jnp.int32),
        pages,
        jnp.arange(B + 1, dtype=jnp.int32),
        jnp.full(1, B, jnp.int32),
        sm_scale=C**-0.5,
        sliding_window=window,
        num_kv_pages_per_block=max(1, min(KEYS_PER_BLOCK, S) // page),
        num_queries_per_block=min(QUERIES_PER_BLOCK, B),
    )
    return out_BHC.reshape(B, 1, H, C)
