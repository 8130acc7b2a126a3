"""Exact top-k over a large vocabulary, cheaper than sorting it.

The k largest values lie within the k blocks with the largest maxima (each of those maxima is itself
at least as large as any member of another block), so two small searches replace a large one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.types import Array

BLOCK = 128  # entries per block: one vector register row on every backend


def top_k_ids(x: Array, k: int, block: int = BLOCK) -> Array:
    """Ids [..., K] int32 of the k = min(k, V) largest entries of the last axis, largest first.

    Exact; ties may be resolved otherwise than by `jax.lax.top_k`, which changes no divergence.
    No gradient: ids are integers.
    """
    x = jax.lax.stop_gradient(x)
    size = x.shape[-1]
    k = min(k, size)
    blocks = -(-size // block)
    if blocks <= 2 * k or blocks < 8:
        return jax.lax.top_k(x, k)[1]
    low = jnp.finfo(x.dtype).min
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - size)], constant_values=low)
    grid = padded.reshape(*x.shape[:-1], blocks, block)
    winners = jax.lax.top_k(grid.max(-1), k)[1]
    members = jnp.take_along_axis(grid, winners[..., None], -2)
    places = jax.lax.top_k(members.reshape(*x.shape[:-1], k * block), k)[1]
    block_of = jnp.take_along_axis(winners, places // block, -1)
    return block_of * block + places % block


def gather(x: Array, ids: Array) -> Array:
    """x[..., ids] along the last axis."""
    return jnp.take_along_axis(x, ids, -1)
