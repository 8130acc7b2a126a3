"""Every attention implementation against the plain definition, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import attention
from sdjax.parallel import make_mesh


def example(T, B=2, H=6, N=2, C=8):
    """q, k, v and three segments a row with padding at its end."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, T, H, C), np.float32)
    k, v = rng.standard_normal((2, B, T, N, C), np.float32)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[:, T - T // 8 :] = 0
    return tuple(map(jnp.asarray, (q, k, v, segments)))


def by_hand(q, k, v, segments, window):
    """The definition in numpy loops, so that the reference itself is held to something."""
    B, T, H, C = q.shape
    G = H // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(t + 1)
                if segments[b, s] == segments[b, t] and (window is None or t - s < window)
            ]
            for h in range(H):
                score = k[b, seen, h // G] @ q[b, t, h] / np.sqrt(C)
                prob = np.exp(score - score.max())
                out[b, t, h] = prob / prob.sum() @ v[b, seen, h // G]
    return out


def value_and_grads(fn, q, k, v, segments):
    def loss(q, k, v):
        out = fn(q, k, v, segments)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *grads]


def assert_like_reference(fn, args, window):
    wanted = value_and_grads(
        functools.partial(attention.segment_attention, window=window, impl="reference"), *args
    )
    for name, a, b in zip("out dq dk dv".split(), value_and_grads(fn, *args), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("window", [None, 4])
def test_reference_is_the_definition(window):
    args = example(17)
    out = attention.segment_attention(*args, window=window, impl="reference")
    np.testing.assert_allclose(out, by_hand(*map(np.asarray, args), window), atol=1e-5)


@pytest.mark.parametrize(("T", "block", "window"), [(40, 8, None), (37, 16, 5)])
def test_blockwise_matches_reference(T, block, window):
    """Rows that are no multiple of the block, and windows below, at and above a block."""

    def fn(q, k, v, segments):
        return attention.xla_attention(q, k, v, segments, segments, window=window, block=block)

    assert_like_reference(fn, example(T), window)


def test_blockwise_skips_what_no_query_sees():
    """NaN in keys of another segment must not reach a block that is skipped, nor the result."""
    q, k, v, _ = example(32)
    segments = jnp.repeat(jnp.array([[1, 2], [1, 2]]), 16, axis=1)
    k = k.at[:, :16].set(jnp.nan)
    out = attention.xla_attention(q, k, v, segments, segments, block=8)
    assert np.isfinite(out[:, 16:]).all()


def test_blockwise_memory_does_not_grow_with_the_square_of_the_length():
    """Temporaries of a gradient over 2,048 tokens stay far below one [B, H, T, T] array."""
    shapes = [jax.ShapeDtypeStruct((1, 2048, n, 16), jnp.float32) for n in (8, 2, 2)]
    segments = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    fn = jax.grad(lambda q, k, v, s: attention.segment_attention(q, k, v, s, impl="xla").sum())
    compiled = jax.jit(fn).lower(*shapes, segments).compile()
    scores = 8 * 2048 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


def test_traced_offset_sees_the_same_keys():
    """A shard of the context axis knows its place only while running."""
    q, k, v, segments = example(40)
    whole = attention.segment_attention(q, k, v, segments, window=9, impl="reference")
    part = jax.jit(
        lambda offset: attention.xla_attention(
            q[:, 24:], k, v, segments[:, 24:], segments, offset, window=9, block=8
        )
    )(24)
    np.testing.assert_allclose(part, whole[:, 24:], atol=1e-5)


def test_splash_matches_reference(window=40):
    """The TPU kernel, interpreted: segments, padding to whole blocks, grouped heads, gradients."""
    fn = functools.partial(attention.segment_attention, window=window, impl="splash")
    assert_like_reference(fn, example(130, B=1, H=4, N=2), window)


def test_splash_refuses_uneven_context_shards():
    q, k, v, segments = example(100)
    with pytest.raises(ValueError, match="multiple of 128"):
        attention.splash_attention(q[:, :50], k, v, segments[:, :50], segments)


def test_cudnn_mask_matches_reference(window=6):
    """The adapter of the GPU kernel, run on XLA: there is no cuDNN here."""

    def fn(q, k, v, segments):
        return attention.cudnn_attention(
            q, k, v, segments, segments, window=window, implementation="xla"
        )

    assert_like_reference(fn, example(24), window)


def test_same_on_a_mesh():
    """Rows over data, heads over tensor, tokens over context: nothing changes."""
    args = example(48)
    with jax.set_mesh(make_mesh(data=2, tensor=2, context=2)):
        fn = functools.partial(attention.segment_attention, window=11, impl="xla")
        got = [np.asarray(x) for x in value_and_grads(fn, *args)]
    wanted = value_and_grads(
        functools.partial(attention.segment_attention, window=11, impl="reference"), *args
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="model.attention='flash'"):
        attention.segment_attention(*example(8), impl="flash")
