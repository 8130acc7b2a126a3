"""Causal attention within the segments of a packed row, on every backend.

`segment_attention` chooses between the plain reference, a blockwise XLA version whose memory grows
with T and not with T squared, splash attention (TPU) and cuDNN (GPU), and splits it over the mesh.
Grouped-query heads, sliding windows and gradients work in all of them. A token's place is its index
in the row: segments must be contiguous and in order.

The implementations see the part of an array that one device holds: queries q_BTHC with segment ids
[B, T], keys and values k_BSNC with theirs [B, S], and `q_offset`, the index among the keys of the
first query.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from sdjax.models.blockwise import BLOCK, MASKED, blockwise_attention, visible
from sdjax.models.sharded_attention import sharded

IMPLS = ("auto", "reference", "xla", "splash", "cudnn")
LANES = 128  # of a TPU's vector unit: blocks of splash come in multiples of it
SPLASH_BLOCK = 512


def segment_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    window: int | None = None,
    impl: str = "auto",
) -> Float[Array, "B T H C"]:
    """softmax(q k / sqrt(C)) v over the earlier tokens of the same segment.

    Query head h reads key-value head h // (H / N). A token sees itself and the `window` - 1 tokens
    before it. Softmax in float32, output in q's dtype. Padding (segment 0) attends to padding, so
    nothing is NaN there. Raises ValueError for an unknown `impl`.
    """
    if impl not in IMPLS:
        raise ValueError(f"model.attention={impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl = _choose(q_BTHC)
    local = functools.partial(IMPLEMENTATIONS[impl], window=window)
    static_offset = impl == "splash"  # its masks are made on the host
    return sharded(local, static_offset)(q_BTHC, k_BTNC, v_BTNC, segment_ids_BT)


def _choose(q_BTHC: Array) -> str:
    """The best implementation of the default backend; cuDNN has none for float32."""
    backend = jax.default_backend()
    if backend == "gpu" and q_BTHC.dtype != jnp.float32 and q_BTHC.shape[-1] % 8 == 0:
        return "cudnn"
    return "splash" if backend == "tpu" else "xla"


def reference_attention(
    q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset=0, *, window: int | None = None
) -> Array:
    """The definition, with all scores [B, H, T, S] in memory: fastest for short rows."""
    B, T, H, C = q_BTHC.shape
    N = k_BSNC.shape[2]
    q_BTNGC = q_BTHC.reshape(B, T, N, H // N, C)
    wide = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    score = jnp.einsum("btngc,bsnc->bngts", q_BTNGC, k_BSNC, preferred_element_type=wide)
    seen_BTS = _seen(q_segment_BT, kv_segment_BS, q_offset, window)
    score = jnp.where(seen_BTS[:, None, None], score * C**-0.5, MASKED)
    prob = jax.nn.softmax(score, axis=-1).astype(v_BSNC.dtype)
    out = jnp.einsum("bngts,bsnc->btngc", prob, v_BSNC)
    return out.reshape(B, T, H, C).astype(q_BTHC.dtype)


def _seen(q_segment_BT, kv_segment_BS, q_offset, window) -> Array:
    """Whether query t sees key s, bool [B, T, S]."""
    return visible(
        q_offset + jnp.arange(q_segment_BT.shape[1])[None, :, None],
        jnp.arange(kv_segment_BS.shape[1])[None, None, :],
        q_segment_BT[:, :, None],
        kv_segment_BS[:, None, :],
        window,
    )


def xla_attention(
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
    """Blockwise in plain XLA; rows of a single block are left to the reference."""
    attend = blockwise_attention
    if max(q_BTHC.shape[1], k_BSNC.shape[1]) <= block:
        attend = reference_attention
    else:
        attend = functools.partial(attend, block=block)
    return attend(q_BTHC, k_BSNC, v_BSNC, q_segment_BT, kv_segment_BS, q_offset, window=window)


def cudnn_attention(
    q_BTHC,
    k_BSNC,
    v_BSNC,
    q_segment_BT,
    kv_segment_BS,
    q_offset=0,
    *,
    window: int | None = None,
    implementation: str = "cudnn",
) -> Array:
    """cuDNN's fused attention; the segments go in as a mask [B, 1, T, S], one byte an entry.

    For bfloat16 and float16 on NVIDIA GPUs. `implementation` "xla" is for tests elsewhere.
    """
    seen_BTS = _seen(q_segment_BT, kv_segment_BS, q_offset, window)
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSNC, v_BSNC, mask=seen_BTS[:, None], implementation=implementation
    )


def splash_attention(
    q_BTHC,
    k_BSNC,
    v_BSNC,
    q_segment_BT,
    kv_segment_BS,
    q_offset: int = 0,
    *,
    window: int | None = None,
) -> Array:
    """The TPU kernel of jax.experimental.pallas, interpreted (slowly) elsewhere.

    Rows are padded to whole blocks with segment -1. Queries that are only a part of the keys' row
    cannot be: a padded query may then see no key, which the kernel turns into NaN.
    """
    T, S, C = q_BTHC.shape[1], k_BSNC.shape[1], q_BTHC.shape[3]
    if T != S and (T % LANES or S % LANES):
        raise ValueError(
            f"each device of mesh.context holds {T} tokens of a row of {S}, splash attention needs "
            f"a multiple of {LANES} there: choose rows of a multiple of {LANES * (S // T)} tokens"
        )
    block_t, block_s = _splash_block(T, T == S), _splash_block(S, T == S)
    pad_t, pad_s = -T % block_t, -S % block_s
    q = _pad(q_BTHC * C**-0.5, pad_t).transpose(0, 2, 1, 3)
    k = _pad(k_BSNC, pad_s).transpose(0, 2, 1, 3)
    v = _pad(v_BSNC, pad_s).transpose(0, 2, 1, 3)
    q_ids = jnp.pad(q_segment_BT, ((0, 0), (0, pad_t)), constant_values=-1)
    kv_ids = jnp.pad(kv_segment_BS, ((0, 0), (0, pad_s)), constant_values=-1)

    shape = (T + pad_t, S + pad_s)
    left = None if window is None else window - 1
    mask = splash.LocalMask(shape, (left, 0), offset=q_offset)
    sizes = splash.BlockSizes(
        block_q=block_t,
        block_kv=block_s,
        block_q_dkv=block_t,
        block_kv_dkv=block_s,
        block_q_dq=block_t,
        block_kv_dq=block_s,
    )

    def run(q, k, v, q_ids, kv_ids, interpret):
        kernel = splash.make_splash_mha_single_device(
            mask=splash.MultiHeadMask([mask] * q.shape[1]), block_sizes=sizes, interpret=interpret
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_ids, kv_ids))

    # By the platform compiled for, not the one compiled on: plans for a TPU are made on CPUs.
    out = jax.lax.platform_dependent(
        q,
        k,
        v,
        q_ids,
        kv_ids,
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )
    return out.transpose(0, 2, 1, 3)[:, :T].astype(q_BTHC.dtype)


def _splash_block(size: int, may_pad: bool) -> int:
    """Tokens of a block: the largest we use where rows may be padded, else a divisor of `size`."""
    return min(SPLASH_BLOCK, -(-size // LANES) * LANES) if may_pad else math.gcd(size, SPLASH_BLOCK)


def _pad(x: Array, tokens: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0)))


IMPLEMENTATIONS = {
    "reference": reference_attention,
    "xla": xla_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
