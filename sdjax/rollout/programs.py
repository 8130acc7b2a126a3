"""The two compiled functions of the engine: prefill of prompts, and a chunk of decode steps.

Pure functions of parameters, cache and slot arrays; which request sits in which slot is the host's
business (`sdjax.rollout.engine`). Randomness comes from what names a response, never from the slot.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from sdjax.models import decoder
from sdjax.models.attention import segment_attention
from sdjax.models.config import ModelConfig
from sdjax.rollout import cache as kv
from sdjax.rollout import sampling
from sdjax.types import Params


@dataclasses.dataclass(frozen=True)
class Static:
    """What the compiled functions are specialised to besides their shapes."""

    model: ModelConfig
    cache: kv.CacheSpec
    end_tokens: tuple[int, ...]
    chunk: int
    compute_dtype: str
    candidates: int
    by_row: bool
    output_first: bool = False  # weights of the layers as [output, input]: faster on a CPU


@flax.struct.dataclass
class Slots:
    """What a decode chunk needs to know of each slot, [B] unless noted.

    `token` is the last token of the row, not yet in the cache; `length` how many are; `generated`
    how many response tokens the row has; `budget` how many more it may get (0: the slot is idle).
    `forced_IB` [I, B] holds the tokens forced at each step of the chunk, else -1. `seed`, `request`
    and `sample` name the response.
    """

    token: Int[Array, " B"]
    length: Int[Array, " B"]
    generated: Int[Array, " B"]
    budget: Int[Array, " B"]
    seed: UInt32[Array, " B"]
    request: UInt32[Array, " B"]
    sample: UInt32[Array, " B"]
    settings: sampling.Settings
    forced_IB: Int[Array, "I B"]


@flax.struct.dataclass
class Chunk:
    """What a decode chunk sampled: rows of [I, B] are valid up to `count_B` of each slot.

    `broken_B` is the step at which the logits of a live row were not finite, else -1.
    """

    token_IB: Int[Array, "I B"]
    logp_IB: Float[Array, "I B"]
    truncated_logp_IB: Float[Array, "I B"]
    count_B: Int[Array, " B"]
    broken_B: Int[Array, " B"]
    steps: Int[Array, ""]


@flax.struct.dataclass
class _Loop:
    step: Array
    token_B: Array
    live_B: Array
    layers: list[kv.Layer]
    chunk: Chunk


def prefill(
    params: Params,
    tokens_PT: Int[Array, "P T"],
    index_PT: Int[Array, "P T"],
    segment_PT: Int[Array, "P T"],
    *,
    static: Static,
) -> list[kv.Layer]:
    """Keys and values of packed prompts (`prompts.PromptBatch`), in the cache's layout."""

    def attend(q, k, v, state, window):
        del state
        out = segment_attention(q, k, v, segment_PT, window=window)
        return out, kv.pack(k, v, static.cache)

    _, layers = decoder.forward(
        params,
        tokens_PT,
        index_PT,
        static.model,
        attend=attend,
        layer_state=[()] * static.model.n_layers,
        compute_dtype=static.compute_dtype,
    )
    return layers


def decode(
    params: Params,
    layers: list[kv.Layer],
    slots: Slots,
    stop_after: Int[Array, ""],
    *,
    static: Static,
) -> tuple[list[kv.Layer], Chunk]:
    """Samples up to `static.chunk` tokens for every live slot.

    Ends early when no slot lives, when `stop_after` slots have finished, or when logits break.
    """
    rows = slots.token.shape[0]
    key_B2 = sampling.request_keys(slots.seed, slots.request, slots.sample)
    ends_E = jnp.asarray(static.end_tokens, jnp.int32)
    started_B = slots.budget > 0
    # outside the loop: inside, XLA would compute them anew for every head of every layer
    angles_BI = decoder.angles_of(slots.length[:, None] + jnp.arange(static.chunk), static.model)

    def going(loop: _Loop) -> Bool[Array, ""]:
        finished = (started_B & ~loop.live_B).sum()
        fine = (loop.chunk.broken_B < 0).all() & (finished < stop_after)
        return (loop.step < static.chunk) & loop.live_B.any() & fine

    def advance(loop: _Loop) -> _Loop:
        step = loop.step
        logits, layers = _next_logits(params, loop, slots.length, angles_BI, static)
        forced_B = lax.dynamic_index_in_dim(slots.forced_IB, step, 0, keepdims=False)
        uniform_B2 = sampling.uniforms(key_B2, slots.generated + step)
        draw = sampling.sample(
            logits,
            slots.settings,
            uniform_B2,
            static.candidates,
            static.by_row,
            forced_B,
            rows_last=static.output_first,
        )
        count_B = loop.chunk.count_B + loop.live_B
        ended_B = (draw.token[:, None] == ends_E).any(-1) & (forced_B < 0)
        write = lambda out_IB, x_B: lax.dynamic_update_slice_in_dim(out_IB, x_B[None], step, 0)
        chunk = Chunk(
            token_IB=write(loop.chunk.token_IB, draw.token),
            logp_IB=write(loop.chunk.logp_IB, draw.logp),
            truncated_logp_IB=write(loop.chunk.truncated_logp_IB, draw.truncated_logp),
            count_B=count_B,
            broken_B=jnp.where(loop.live_B & ~draw.finite, step, loop.chunk.broken_B),
            steps=step + 1,
        )
        live_B = loop.live_B & ~ended_B & (count_B < slots.budget)
        return _Loop(step + 1, draw.token, live_B, layers, chunk)

    integers_IB = jnp.zeros((static.chunk, rows), jnp.int32)
    floats_IB = jnp.zeros((static.chunk, rows), jnp.float32)
    nothing_B = jnp.zeros(rows, jnp.int32)
    empty = Chunk(integers_IB, floats_IB, floats_IB, nothing_B, nothing_B - 1, jnp.int32(0))
    loop = _Loop(jnp.int32(0), slots.token, started_B, layers, empty)
    loop = lax.while_loop(going, advance, loop)
    return [kv.finish(layer, slots.length, static.chunk) for layer in loop.layers], loop.chunk


def _next_logits(params, loop: _Loop, length_B, angles_BI, static: Static):
    """Logits of the token after `loop.token_B`, and the cache with that token in it.

    [B, V], or [V, B] where the weights are output first: turning them around would cost a fourth of
    the head product.
    """
    windows = set(static.model.windows)
    place = kv.Place.of(loop.layers[0], length_B, loop.step, static.chunk, windows)

    def attend(q_B1HC, k_B1NC, v_B1NC, layer, window):
        return kv.attend_step(q_B1HC, k_B1NC, v_B1NC, layer, place, window)

    at_step = lambda x_BI: lax.dynamic_slice_in_dim(x_BI, loop.step, 1, axis=1)
    hidden_B1D, layers = decoder.forward(
        params,
        loop.token_B[:, None],
        (length_B + loop.step)[:, None],
        static.model,
        angles=jax.tree.map(at_step, angles_BI),
        attend=attend,
        layer_state=loop.layers,
        compute_dtype=static.compute_dtype,
    )
    if static.output_first:
        return decoder.vocab_first_logits(params, hidden_B1D[:, 0], static.model), layers
    return decoder.logits(params, hidden_B1D, static.model)[:, 0], layers
