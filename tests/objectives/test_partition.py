"""The blockwise log-sum-exp equals the plain one, in value and gradient, at its odd ends too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.objectives import partition


@pytest.mark.parametrize("vocab", [4096, 4224, 4100, 64])
def test_value_and_gradient_are_those_of_logsumexp(vocab):
    """Catches a lost block, a wrong maximum and a gradient that is not the softmax."""
    with jax.enable_x64():
        draw = np.random.default_rng(vocab)
        x = jnp.asarray(draw.normal(size=(2, 3, vocab)) * 30)
        x = x.at[0, 0, vocab // 2 :].set(-jnp.inf).at[1, 2, 5].set(900.0)
        weight = jnp.asarray(draw.normal(size=(2, 3)))
        ours = lambda x: (partition.log_sum_exp(x) * weight).sum()
        plain = lambda x: (jax.nn.logsumexp(x, -1) * weight).sum()
        np.testing.assert_allclose(partition.log_sum_exp(x), jax.nn.logsumexp(x, -1), rtol=1e-14)
        gradient = jax.jit(jax.grad(ours))(x)
        np.testing.assert_allclose(gradient, jax.grad(plain)(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("vocab", [4096, 64])
def test_dividing_by_a_temperature_inside_is_dividing_before(vocab):
    """Catches a maximum, a sum or a gradient that forgets the temperature."""
    with jax.enable_x64():
        x = jnp.asarray(np.random.default_rng(vocab).normal(size=(2, 3, vocab)) * 30)
        x = x.at[0, 0].set(-jnp.inf).at[1, 1, 7].set(-jnp.inf)
        inside = lambda x, t: partition.log_sum_exp(x, t)
        before = lambda x, t: jax.nn.logsumexp(x / t, -1)
        for temperature in (0.7, jnp.asarray(1.3)):
            np.testing.assert_allclose(
                jax.jit(inside)(x, temperature), before(x, temperature), rtol=1e-13
            )
            total = lambda f, t=temperature: jax.jit(jax.grad(lambda x: f(x, t)[:, 1:].sum()))(x)
            np.testing.assert_allclose(total(inside), total(before), rtol=1e-12, atol=1e-15)


def test_a_large_vocabulary_is_summed_by_blocks():
    """Catches a fallback that is taken where the blocks were meant, or the other way round."""
    text = lambda vocab: str(jax.make_jaxpr(partition.log_sum_exp)(jnp.zeros((2, vocab))))
    assert "optimization_barrier" in text(151936)
    assert "optimization_barrier" not in text(151937)
