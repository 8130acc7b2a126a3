"""A tiny model, random requests, and plain one-by-one decoding to compare the engine with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.models import decoder
from sdjax.models.config import ModelConfig
from sdjax.records import Request, SamplingParams
from sdjax.rollout import sampling
from sdjax.rollout.engine import EngineConfig

MODEL = ModelConfig(
    "qwen3", 160, 32, 2, 4, 2, 8, 64, qk_norm="head", tie_embeddings=True, windows=(None, 12)
)
ENGINE = EngineConfig(
    slots=4,
    max_prompt_len=16,
    max_new_tokens=28,
    chunk=8,
    first_length=32,
    row_halvings=0,
    candidates=16,
    prefill_tokens=64,
)
ENDS = (1, 2)


def make_requests(count: int, seed: int = 0, n: int = 1, **sampling_options) -> list[Request]:
    """Requests with random prompts and limits, every third with its own truncation."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        options = dict(max_new_tokens=int(rng.integers(1, 29)), seed=seed)
        if i % 3 == 1:
            options |= dict(temperature=0.8, top_p=0.9, top_k=20)
        if i % 3 == 2:
            options |= dict(temperature=0.0)
        prompt = tuple(rng.integers(3, MODEL.vocab_size, rng.integers(1, 17)).tolist())
        requests.append(Request(i, prompt, n, SamplingParams(**(options | sampling_options))))
    return requests


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params, tokens_BT, model=MODEL):
    """Logits of whole rows by the training forward, right-padded: no cache, no slots."""
    ones_BT = jnp.ones_like(tokens_BT)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = decoder.hidden_states(params, tokens_BT, ones_BT, positions_BT, model)
    return decoder.logits(params, hidden_BTD, model)


draw = jax.jit(sampling.sample, static_argnums=(3, 4))


def one_by_one(params, request: Request, index: int) -> tuple[list[int], list[float]]:
    """One response by recomputing everything for every token."""
    s = request.sampling
    values = (s.temperature, s.top_k, s.top_p, s.min_p)
    settings = sampling.Settings(*(jnp.asarray([x]) for x in values))
    names = (jnp.asarray([x], jnp.uint32) for x in (s.seed, request.id, index))
    key_12 = sampling.request_keys(*names)
    tokens, logps = list(request.prompt_tokens), []
    response: list[int] = []
    while len(response) < s.max_new_tokens:
        row_1T = np.zeros((1, 64), np.int32)
        row_1T[0, : len(tokens)] = tokens
        logits_1V = logits_of(params, row_1T)[:, len(tokens) - 1]
        place = len(response)
        forced = request.forced_prefix[place] if place < len(request.forced_prefix) else -1
        uniform_12 = sampling.uniforms(key_12, jnp.asarray([place]))
        out = draw(logits_1V, settings, uniform_12, 16, True, jnp.asarray([forced]))
        tokens.append(int(out.token[0]))
        response.append(tokens[-1])
        logps.append(float(out.logp[0]))
        if forced < 0 and response[-1] in ENDS:
            break
    return response, logps
