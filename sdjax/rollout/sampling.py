"""Draws tokens from logits: temperature, top-k, top-p, min-p, greedy; settings per row.

A truncation is a *floor*: every token whose scaled logit reaches it is kept, tokens tied at the
floor included. Floors come from the largest `candidates` logits when these are checked to contain
the nucleus, else from an exact bisection over the full row; the vocabulary is never sorted.
A draw is an inverse CDF in two levels, block sums and then inside one block, from two uniforms that
depend only on (request seed, request id, sample index, token position): the same request gives the
same tokens in any slot or batch.

Does not know models, caches or end tokens.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128  # tokens per block; divides the vocabularies of Qwen, Llama 3 and SmolLM2
UNDERFLOW = 104.0  # exp(-104) is 0 in float32: nothing below max - 104 carries mass


@flax.struct.dataclass
class Settings:
    """Sampling settings of each row: float32 or int32 [B]; temperature 0 is greedy.

    `top_k` 0, `top_p` 1 and `min_p` 0 switch that truncation off.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]

    @property
    def truncates(self) -> Bool[Array, " B"]:
        """Rows whose distribution is cut by top-k, top-p or min-p."""
        cut = (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)
        return cut & (self.temperature > 0.0)


@flax.struct.dataclass
class Draw:
    """One token per row.

    `logp` is after temperature and before truncation, `truncated_logp` after it (greedy rows: under
    temperature 1, and 0). `finite` is false where the row's logits hold a NaN or an infinity that
    leaves no distribution.
    """

    token: Int[Array, " B"]
    logp: Float[Array, " B"]
    truncated_logp: Float[Array, " B"]
    finite: Bool[Array, " B"]


def request_keys(
    seed_B: Int[Array, " B"] | UInt32[Array, " B"],
    request_B: Int[Array, " B"] | UInt32[Array, " B"],
    sample_B: Int[Array, " B"] | UInt32[Array, " B"],
) -> UInt32[Array, "B 2"]:
    """Key data of each row's stream of random numbers, from what names the response."""

    def one(seed, request, sample):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), request)
        return jax.random.key_data(jax.random.fold_in(key, sample))

    return jax.vmap(one)(seed_B, request_B, sample_B)


def uniforms(key_B2: UInt32[Array, "B 2"], position_B: Int[Array, " B"]) -> Float[Array, "B 2"]:
    """Two uniforms in [0, 1) for the token at `position_B` of each row's response."""

    def one(data, position):
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), (2,), jnp.uint32)

    # 24 bits: u < 1 - 2^-24 keeps u * total strictly below total in float32
    return (jax.vmap(one)(key_B2, position_B) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def sample(
    logits_BV: Float[Array, "B V"],
    settings: Settings,
    uniform_B2: Float[Array, "B 2"],
    candidates: int = 128,
    by_row: bool = False,
    forced_B: Int[Array, " B"] | None = None,
) -> Draw:
    """Draws one token per row.

    `by_row` runs the exact fallback row by row: right where rows are not sharded and a row fits a
    core's cache, as on the CPU. The order is temperature, top-k, top-p over what top-k left, min-p
    relative to the largest probability (as in transformers). Rows whose `forced_B` is not -1 take
    that token; its `truncated_logp` is its `logp`, for nothing was drawn. Nothing
    raises: a row without a distribution says so in `Draw.finite`.
    """
    greedy_B = settings.temperature <= 0.0
    scale_B = 1.0 / jnp.where(greedy_B, 1.0, settings.temperature)
    raw_BnE = _blocks(logits_BV.astype(jnp.float32))
    # the barriers keep XLA from merging the two levels of each reduction into a second full pass
    top_Bn = lax.optimization_barrier(raw_BnE.max(-1)) * scale_B[:, None]
    max_B = top_Bn.max(-1)
    mass_Bn = _mass(raw_BnE, scale_B, max_B)
    total_B = mass_Bn.sum(-1)
    finite_B = jnp.isfinite(total_B) & (total_B > 0)

    floor_B, kept_Bn = lax.cond(
        settings.truncates.any(),
        lambda: _truncate(raw_BnE, scale_B, top_Bn, mass_Bn, settings, candidates, by_row),
        lambda: (jnp.full_like(max_B, -jnp.inf), mass_Bn),
    )
    floor_B = jnp.where(greedy_B, max_B, floor_B)
    kept_Bn = jnp.where(greedy_B[:, None], (top_Bn == max_B[:, None]).astype(jnp.float32), kept_Bn)
    uniform_B2 = jnp.where(greedy_B[:, None], 0.0, uniform_B2)  # 0: the first of the kept tokens

    block_B = _pick(kept_Bn, uniform_B2[:, 0])
    x_BE = jnp.take_along_axis(raw_BnE, block_B[:, None, None], axis=1)[:, 0] * scale_B[:, None]
    weight_BE = jnp.where(x_BE >= floor_B[:, None], jnp.exp(x_BE - max_B[:, None]), 0.0)
    place_B = _pick(weight_BE, uniform_B2[:, 1])
    token_B = block_B * raw_BnE.shape[-1] + place_B
    if forced_B is not None:
        token_B = jnp.where(forced_B >= 0, forced_B, token_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0].astype(jnp.float32)
    chosen_B = chosen_B * scale_B - max_B
    logp_B = chosen_B - jnp.log(total_B)
    truncated_B = jnp.where(greedy_B, 0.0, chosen_B - jnp.log(kept_Bn.sum(-1)))
    if forced_B is not None:
        truncated_B = jnp.where(forced_B >= 0, logp_B, truncated_B)
    return Draw(token_B, logp_B, truncated_B, finite_B)


def _blocks(x_BV: Float[Array, "B V"]) -> Float[Array, "B n E"]:
    """The vocabulary cut into blocks; the end of the last one is filled with -inf."""
    rows, vocab = x_BV.shape
    size = min(BLOCK, vocab)
    if vocab % size:
        x_BV = jnp.pad(x_BV, ((0, 0), (0, -vocab % size)), constant_values=-jnp.inf)
    return x_BV.reshape(rows, -1, size)


def _pick(weight_BE: Float[Array, "B E"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose cumulative weight exceeds uniform * total, never one of weight 0.

    Prefix sums may be uneven by an ulp, so the check of the weight itself is what keeps truncated
    tokens out.
    """
    cumulative_BE = jnp.cumsum(weight_BE, axis=-1)
    hit_BE = (cumulative_BE > uniform_B[:, None] * cumulative_BE[:, -1:]) & (weight_BE > 0)
    last_B = weight_BE.shape[-1] - 1 - jnp.argmax(weight_BE[:, ::-1] > 0, axis=-1)
    return jnp.where(hit_BE.any(-1), jnp.argmax(hit_BE, axis=-1), last_B).astype(jnp.int32)


def _mass(raw_BnE, scale_B, max_B, floor_B=None) -> Float[Array, "B n"]:
    """Mass of each block, of the tokens at `floor_B` or above; the largest token has mass 1."""
    x_BnE = raw_BnE * scale_B[:, None, None]
    p_BnE = jnp.exp(x_BnE - max_B[:, None, None])
    if floor_B is not None:
        p_BnE = jnp.where(x_BnE >= floor_B[:, None, None], p_BnE, 0.0)
    return lax.optimization_barrier(p_BnE.sum(-1))


def _truncate(raw_BnE, scale_B, top_Bn, mass_Bn, settings, candidates, by_row):
    """Floors of the rows that truncate (-inf elsewhere) and the block masses that they leave."""
    max_B, total_B, needs_B = top_Bn.max(-1), mass_Bn.sum(-1), settings.truncates
    largest_BC = _largest(raw_BnE, top_Bn, candidates) * scale_B[:, None]
    complete = candidates >= raw_BnE.shape[1] * raw_BnE.shape[2]
    floor_B, found_B = _floor_of_candidates(largest_BC, complete, max_B, total_B, settings)
    unknown_B = needs_B & ~found_B
    floor_B = lax.cond(
        unknown_B.any(),
        lambda: _exact_floors(raw_BnE, scale_B, max_B, settings, unknown_B, floor_B, by_row),
        lambda: floor_B,
    )
    floor_B = jnp.where(needs_B, floor_B, -jnp.inf)
    return floor_B, _mass(raw_BnE, scale_B, max_B, floor_B)


def _largest(x_BnE, top_Bn, count: int) -> Float[Array, "B C"]:
    """The `count` largest values of each row in falling order.

    They lie in the `count` blocks with the largest maxima: a value outside has as many larger or
    equal ones, the maxima of those blocks, before it.
    """
    rows, blocks, size = x_BnE.shape
    if blocks > count:
        best_BC = lax.top_k(top_Bn, count)[1]
        x_BnE = jnp.take_along_axis(x_BnE, best_BC[:, :, None], axis=1)
    x_BX = x_BnE.reshape(rows, -1)
    return lax.top_k(x_BX, min(count, x_BX.shape[1]))[0]


def _floor_of_candidates(x_BC, complete: bool, max_B, total_B, settings):
    """Floors from the largest values, and whether these are proven to contain the kept set."""
    count = x_BC.shape[1]
    k_B = settings.top_k
    p_BC = jnp.exp(x_BC - max_B[:, None])
    kth_B = jnp.take_along_axis(x_BC, jnp.clip(k_B - 1, 0, count - 1)[:, None], axis=1)[:, 0]
    k_floor_B = jnp.where((k_B > 0) & (k_B <= count), kth_B, -jnp.inf)
    # a candidate below the floor proves that no token tied at the floor was left outside
    k_found_B = (k_B == 0) | ((k_B <= count) & (x_BC[:, -1] < k_floor_B))

    p_BC = jnp.where(x_BC >= k_floor_B[:, None], p_BC, 0.0)
    cumulative_BC = jnp.cumsum(p_BC, axis=-1)
    left_B = jnp.where(k_B > 0, cumulative_BC[:, -1], total_B)
    target_B = settings.top_p * left_B
    last_B = jnp.sum(cumulative_BC - p_BC < target_B[:, None], axis=-1) - 1
    p_floor_B = jnp.take_along_axis(x_BC, jnp.clip(last_B, 0)[:, None], axis=1)[:, 0]
    off_B = settings.top_p >= 1.0
    p_found_B = off_B | (cumulative_BC[:, -1] >= target_B)
    floor_B = jnp.maximum(k_floor_B, jnp.where(off_B, -jnp.inf, p_floor_B))
    floor_B = jnp.maximum(floor_B, _min_p_floor(max_B, settings))
    return floor_B, (k_found_B & p_found_B) | complete


def _min_p_floor(max_B, settings):
    return jnp.where(settings.min_p > 0, max_B + jnp.log(settings.min_p), -jnp.inf)


def _exact_floors(raw_BnE, scale_B, max_B, settings, unknown_B, floor_B, by_row: bool):
    """`floor_B` with the unknown rows replaced by their exact floor."""
    if not by_row:
        exact_B = _floor_by_bisection(raw_BnE, scale_B, max_B, settings, unknown_B)
        return jnp.where(unknown_B, exact_B, floor_B)
    order_B = jnp.argsort(~unknown_B)

    def one(i, floor_B):
        row = lambda x: lax.dynamic_slice_in_dim(x, order_B[i], 1)
        exact_1 = _floor_by_bisection(
            row(raw_BnE), row(scale_B), row(max_B), jax.tree.map(row, settings), row(unknown_B)
        )
        return lax.dynamic_update_slice_in_dim(floor_B, exact_1, order_B[i], 0)

    return lax.fori_loop(0, unknown_B.sum(), one, floor_B)


def _floor_by_bisection(raw_BnE, scale_B, max_B, settings, active_B):
    """Exact floors over the full rows, by bisection on the bits of the floor."""

    def count(floor_B):
        kept_BnE = raw_BnE * scale_B[:, None, None] >= floor_B[:, None, None]
        return kept_BnE.astype(jnp.float32).sum((1, 2))

    def mass(floor_B):
        return _mass(raw_BnE, scale_B, max_B, floor_B).sum(-1)

    use_k_B, use_p_B = settings.top_k > 0, settings.top_p < 1.0
    lowest_B = jnp.full_like(max_B, -jnp.inf)
    enough_B = settings.top_k.astype(jnp.float32)
    k_floor_B = _bisect(lambda f_B: count(f_B) >= enough_B, lowest_B, max_B, active_B & use_k_B)
    target_B = settings.top_p * mass(k_floor_B)
    p_floor_B = _bisect(
        lambda f_B: mass(jnp.maximum(f_B, k_floor_B)) >= target_B,
        jnp.maximum(max_B - UNDERFLOW, k_floor_B),
        max_B,
        active_B & use_p_B,
    )
    p_floor_B = jnp.where(use_p_B, p_floor_B, -jnp.inf)
    return jnp.maximum(jnp.maximum(k_floor_B, p_floor_B), _min_p_floor(max_B, settings))


def _bisect(reaches, low_B, high_B, active_B):
    """The largest floor in [low, high] at which `reaches` holds, given that it holds at low."""
    low_key_B, high_key_B = _ordered_bits(low_B), _ordered_bits(high_B)
    above_B = jnp.where(active_B, high_key_B + 1, low_key_B + 1)  # first key where it fails

    def narrow(state):
        low_B, above_B = state
        middle_B = (low_B >> 1) + (above_B >> 1) + (low_B & above_B & 1)
        holds_B = reaches(_from_ordered_bits(middle_B)) | (middle_B == low_B)
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, above_B, middle_B)

    def wide(state):
        return (state[0] + 1 != state[1]).any()  # not a difference: it could overflow

    low_key_B, _ = lax.while_loop(wide, narrow, (low_key_B, above_B))
    return _from_ordered_bits(low_key_B)


def _ordered_bits(x_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """int32 in the same order as the floats."""
    bits = lax.bitcast_convert_type(x_B.astype(jnp.float32), jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _from_ordered_bits(key_B: Int[Array, " B"]) -> Float[Array, " B"]:
    bits = jnp.where(key_B >= 0, key_B, key_B ^ 0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)
