"""A row split over the context axis: the TPU's kernel gives what it gives on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import attention
from sdjax.parallel import make_mesh


@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_on_shards_of_a_row(window):
    """Each shard sees the keys before its own queries; gradients of keys come from all shards."""
    rng = np.random.default_rng(0)
    T, C = 256, 8
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, n, C), np.float32)) for n in (2, 1, 1))
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (1, T)), axis=1), jnp.int32)

    def value_and_grads(impl):
        def loss(q, k, v):
            out = attention.segment_attention(q, k, v, segments, window=window, impl=impl)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    wanted = value_and_grads("reference")
    with jax.set_mesh(make_mesh(context=2, devices=jax.devices()[:2])):
        got = value_and_grads("splash")
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), got, wanted)
