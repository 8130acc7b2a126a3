"""The per-token divergence of a response under the two prompts, against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.analysis import token_kl
from sdjax.models import ModelConfig, decoder

CFG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
)


@jax.jit
def log_probs(params, prompt, response):
    """log p(. | prompt, y_<t) at each response token, without padding or chunks [R, V]."""
    tokens = jnp.concatenate([prompt, response])[None]
    places = jnp.arange(tokens.shape[1])[None]
    hidden = decoder.hidden_states(params, tokens, jnp.ones_like(tokens), places, CFG)
    logp = jax.nn.log_softmax(decoder.logits(params, hidden, CFG)[0])
    return logp[len(prompt) - 1 : len(prompt) - 1 + len(response)]


def test_it_is_kl_of_student_to_teacher_at_each_response_token():
    """Catches a shift by one token, the other direction, and padding that leaks in."""
    student = decoder.init_params(CFG, jax.random.key(0))
    teacher = decoder.init_params(CFG, jax.random.key(1))
    rng = np.random.default_rng(0)
    prompt, longer = rng.integers(0, 31, 5), rng.integers(0, 31, 130)
    response = rng.integers(0, 31, 70)
    p, q = log_probs(student, prompt, response), log_probs(teacher, longer, response)
    expected = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    got = token_kl.response_kl(student, teacher, CFG, prompt, longer, response)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)


def test_the_same_model_under_the_same_prompt_does_not_diverge():
    params = decoder.init_params(CFG, jax.random.key(0))
    prompt, response = np.arange(4), np.arange(9)
    got = token_kl.response_kl(params, params, CFG, prompt, prompt, response)
    np.testing.assert_allclose(got, np.zeros(9), atol=1e-6)
