"""Draws tokens from logits: temperature, top-k, top-p, min-p, greedy; settings per row.

A truncation is a *floor* under the scaled logits (distance to the row's largest logit over the
temperature, so 0 at the largest): every token that reaches it is kept, tied ones included. Floors
come from the largest `candidates` logits when these are checked to contain the nucleus, else from
an exact bisection over the full row; the vocabulary is never sorted. A draw is an inverse CDF in
two levels, block sums and then inside one block, from two uniforms that depend only on (request
seed, request id, sample index, token position): the same request gives the same tokens in any slot
or batch. Logits come as [B, V], or as [V, B] where a CPU's head product leaves them: turning 32
rows of 151,936 around costs more than everything the sampler does.

Does not know models, caches or end tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128  # tokens per block; divides the vocabularies of Qwen, Llama 3 and SmolLM2
FULL_ROWS = 64  # rows side by side that fill a CPU's vectors
UNDERFLOW = 104.0  # exp(-104) is 0 in float32: nothing so far below the largest carries mass
COLDEST, HOTTEST = 1e-20, 1e20  # temperatures beyond act as these: logits over them stay finite


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


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Raw float32 logits, the vocabulary cut into blocks: [B, n, E], or [n, E, B] with rows last.

    `peak_B` is each row's largest logit, `scale_B` one over its temperature.
    """

    raw: Array
    rows_last: bool
    peak_B: Array
    scale_B: Array

    @classmethod
    def of(cls, logits: Array, scale_B: Array, rows_last: bool) -> tuple[_Blocks, Array]:
        """Blocks of [B, V] or [V, B], the last one filled up with -inf; and the peaks of each."""
        axis = 0 if rows_last else 1
        vocab, rows = logits.shape[axis], logits.shape[1 - axis]
        size, raw = min(BLOCK, vocab), logits.astype(jnp.float32)
        if vocab % size:
            spare = [(0, -vocab % size if i == axis else 0) for i in range(2)]
            raw = jnp.pad(raw, spare, constant_values=-jnp.inf)
        raw = raw.reshape((-1, size, rows) if rows_last else (rows, -1, size))
        top_Bn = cls(raw, rows_last, scale_B, scale_B).reduced(raw, jnp.max)
        return cls(raw, rows_last, top_Bn.max(-1), scale_B), top_Bn

    @property
    def vocab(self) -> int:
        """Tokens with the filling."""
        return self.blocks * self.size

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.raw.shape[0 if self.rows_last else 1]

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.raw.shape[1 if self.rows_last else 2]

    def beside(self, x_B: Array) -> Array:
        """One number per row, to be broadcast against `raw`."""
        return x_B[None, None] if self.rows_last else x_B[:, None, None]

    def scaled(self) -> Array:
        """Scaled logits, in the shape of `raw`.

        The difference first: a product fused into it would leave the largest at its own rounding
        error instead of 0, which counts at low temperatures.
        """
        return (self.raw - self.beside(self.peak_B)) * self.beside(self.scale_B)

    def scaled_rows(self, raw_BX: Array) -> Array:
        """The same of some logits of each row."""
        return (raw_BX - self.peak_B[:, None]) * self.scale_B[:, None]

    def reduced(self, x: Array, reduce: Callable[..., Array]) -> Float[Array, "B n"]:
        """`reduce` over each block of an array like `raw`."""
        # the barriers keep XLA from merging both levels of a reduction into a second full pass
        out = lax.optimization_barrier(reduce(x, axis=1 if self.rows_last else 2))
        return out.T if self.rows_last else out

    def folded(self) -> tuple[_Blocks, int]:
        """The same with parts of each block as further rows, and how many parts.

        For rows last: exponentials of few rows would leave most lanes of a CPU's vectors empty.
        """
        if not self.rows_last:
            return self, 1
        n, size, rows = self.raw.shape
        parts = math.gcd(size, max(1, FULL_ROWS // rows))
        tiled = lambda x_B: jnp.tile(x_B, parts)
        raw = self.raw.reshape(n, size // parts, parts * rows)
        return _Blocks(raw, True, tiled(self.peak_B), tiled(self.scale_B)), parts

    def rows_first(self) -> _Blocks:
        """The same as [B, n, E]. XLA turns it where it is read: for single rows and blocks."""
        if not self.rows_last:
            return self
        raw_BnE = self.raw.transpose(2, 0, 1)
        return dataclasses.replace(self, raw=raw_BnE, rows_last=False)

    def take(self, block_B: Int[Array, " B"]) -> Float[Array, "B E"]:
        """One block of each row."""
        if not self.rows_last:
            return jnp.take_along_axis(self.raw, block_B[:, None, None], axis=1)[:, 0]
        return jnp.take_along_axis(self.raw, block_B[None, None], axis=0)[0].T


def sample(
    logits: Float[Array, "B V"] | Float[Array, "V B"],
    settings: Settings,
    uniform_B2: Float[Array, "B 2"],
    candidates: int = 128,
    by_row: bool = False,
    forced_B: Int[Array, " B"] | None = None,
    rows_last: bool = False,
) -> Draw:
    """Draws one token per row; with `rows_last` the logits are [V, B].

    `by_row` runs the exact fallback row by row: right where rows are not sharded and a row fits a
    core's cache, as on the CPU. The order is temperature, top-k, top-p over what top-k left, min-p
    relative to the largest probability (as in transformers). Rows whose `forced_B` is not -1 take
    that token; its `truncated_logp` is its `logp`, for nothing was drawn. Nothing
    raises: a row without a distribution says so in `Draw.finite`.
    """
    greedy_B = settings.temperature <= 0.0
    scale_B = 1.0 / jnp.where(greedy_B, 1.0, jnp.clip(settings.temperature, COLDEST, HOTTEST))
    x, top_Bn = _Blocks.of(logits, scale_B, rows_last)
    mass_Bn = _mass(x)
    total_B = mass_Bn.sum(-1)
    finite_B = jnp.isfinite(total_B) & (total_B > 0)

    floor_B, kept_Bn = lax.cond(
        settings.truncates.any(),
        lambda: _truncate(x, top_Bn, mass_Bn, settings, candidates, by_row),
        lambda: (jnp.full_like(total_B, -jnp.inf), mass_Bn),
    )
    floor_B = jnp.where(greedy_B, 0.0, floor_B)
    peaks_Bn = (top_Bn == x.peak_B[:, None]).astype(jnp.float32)
    kept_Bn = jnp.where(greedy_B[:, None], peaks_Bn, kept_Bn)
    uniform_B2 = jnp.where(greedy_B[:, None], 0.0, uniform_B2)  # 0: the first of the kept tokens

    block_B = _pick(kept_Bn, uniform_B2[:, 0])
    x_BE = x.scaled_rows(x.take(block_B))
    weight_BE = jnp.where(x_BE >= floor_B[:, None], jnp.exp(x_BE), 0.0)
    place_B = _pick(weight_BE, uniform_B2[:, 1])
    token_B = block_B * x.size + place_B
    if forced_B is not None:
        token_B = jnp.where(forced_B >= 0, forced_B, token_B)
        block_B, place_B = token_B // x.size, token_B % x.size
        x_BE = x.scaled_rows(x.take(block_B))
    chosen_B = jnp.take_along_axis(x_BE, place_B[:, None], axis=1)[:, 0]
    logp_B = chosen_B - jnp.log(total_B)
    truncated_B = jnp.where(greedy_B, 0.0, chosen_B - jnp.log(kept_Bn.sum(-1)))
    if forced_B is not None:
        truncated_B = jnp.where(forced_B >= 0, logp_B, truncated_B)
    return Draw(token_B, logp_B, truncated_B, finite_B)


def _pick(weight_BE: Float[Array, "B E"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose cumulative weight exceeds uniform * total, never one of weight 0.

    Prefix sums may be uneven by an ulp, so the check of the weight itself is what keeps truncated
    tokens out.
    """
    cumulative_BE = jnp.cumsum(weight_BE, axis=-1)
    hit_BE = (cumulative_BE > uniform_B[:, None] * cumulative_BE[:, -1:]) & (weight_BE > 0)
    last_B = weight_BE.shape[-1] - 1 - jnp.argmax(weight_BE[:, ::-1] > 0, axis=-1)
    return jnp.where(hit_BE.any(-1), jnp.argmax(hit_BE, axis=-1), last_B).astype(jnp.int32)


def _mass(x: _Blocks, floor_B: Array | None = None) -> Float[Array, "B n"]:
    """Mass of each block, of the tokens at `floor_B` or above; the largest token has mass 1."""
    x, parts = x.folded()
    scaled = x.scaled()
    p = jnp.exp(scaled)
    if floor_B is not None:
        p = jnp.where(scaled >= x.beside(jnp.tile(floor_B, parts)), p, 0.0)
    return x.reduced(p, jnp.sum).reshape(parts, -1, x.blocks).sum(0)


def _truncate(x: _Blocks, top_Bn, mass_Bn, settings, candidates, by_row):
    """Floors of the rows that truncate (-inf elsewhere) and the block masses that they leave."""
    total_B, needs_B = mass_Bn.sum(-1), settings.truncates
    largest_BC = x.scaled_rows(_largest(x.rows_first(), top_Bn, candidates))
    complete = candidates >= x.vocab
    floor_B, found_B = _floor_of_candidates(largest_BC, complete, total_B, settings)
    unknown_B = needs_B & ~found_B
    floor_B = lax.cond(
        unknown_B.any(),
        lambda: _exact_floors(x.rows_first(), settings, unknown_B, floor_B, by_row),
        lambda: floor_B,
    )
    floor_B = jnp.where(needs_B, floor_B, -jnp.inf)
    return floor_B, _mass(x, floor_B)


def _largest(x: _Blocks, top_Bn, count: int) -> Float[Array, "B C"]:
    """The `count` largest values of each row in falling order.

    They lie in the `count` blocks with the largest maxima: a value outside has as many larger or
    equal ones, the maxima of those blocks, before it.
    """
    x_BnE = x.raw
    if x.blocks > count:
        best_BC = lax.top_k(top_Bn, count)[1]
        x_BnE = jnp.take_along_axis(x_BnE, best_BC[:, :, None], axis=1)
    x_BX = x_BnE.reshape(x_BnE.shape[0], -1)
    return lax.top_k(x_BX, min(count, x_BX.shape[1]))[0]


def _floor_of_candidates(x_BC, complete: bool, total_B, settings):
    """Floors from the largest values, and whether these are proven to contain the kept set."""
    count = x_BC.shape[1]
    k_B = settings.top_k
    p_BC = jnp.exp(x_BC)
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
    floor_B = jnp.maximum(floor_B, _min_p_floor(settings))
    return floor_B, (k_found_B & p_found_B) | complete


def _min_p_floor(settings):
    return jnp.where(settings.min_p > 0, jnp.log(settings.min_p), -jnp.inf)


def _exact_floors(x: _Blocks, settings, unknown_B, floor_B, by_row: bool):
    """`floor_B` with the unknown rows replaced by their exact floor."""
    if not by_row:
        exact_B = _floor_by_bisection(x, settings, unknown_B)
        return jnp.where(unknown_B, exact_B, floor_B)
    order_B = jnp.argsort(~unknown_B)

    def one(i, floor_B):
        row = lambda y_B: lax.dynamic_slice_in_dim(y_B, order_B[i], 1)
        alone = _Blocks(row(x.raw), False, row(x.peak_B), row(x.scale_B))
        exact_1 = _floor_by_bisection(alone, *jax.tree.map(row, (settings, unknown_B)))
        return lax.dynamic_update_slice_in_dim(floor_B, exact_1, order_B[i], 0)

    return lax.fori_loop(0, unknown_B.sum(), one, floor_B)


def _floor_by_bisection(x: _Blocks, settings, active_B):
    """Exact floors over the full rows, by bisection on the bits of the floor."""

    def count(floor_B):
        kept = x.scaled() >= x.beside(floor_B)
        return x.reduced(kept.astype(jnp.float32), jnp.sum).sum(-1)

    def mass(floor_B):
        return _mass(x, floor_B).sum(-1)

    use_k_B, use_p_B = settings.top_k > 0, settings.top_p < 1.0
    largest_B = jnp.zeros_like(x.peak_B)
    enough_B = settings.top_k.astype(jnp.float32)
    k_floor_B = _bisect(
        lambda f_B: count(f_B) >= enough_B, largest_B - jnp.inf, largest_B, active_B & use_k_B
    )
    target_B = settings.top_p * mass(k_floor_B)
    p_floor_B = _bisect(
        lambda f_B: mass(jnp.maximum(f_B, k_floor_B)) >= target_B,
        jnp.maximum(-UNDERFLOW, k_floor_B),
        largest_B,
        active_B & use_p_B,
    )
    p_floor_B = jnp.where(use_p_B, p_floor_B, -jnp.inf)
    return jnp.maximum(jnp.maximum(k_floor_B, p_floor_B), _min_p_floor(settings))


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
