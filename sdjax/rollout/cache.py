"""The KV cache of the sampling engine: layout, growth, and the tokens a decode chunk adds to it.

One dict per layer, so that a decode step never slices a stack. Keys are [B, N, C, S] and values [B,
N, S, C]: both products of decode attention then run over contiguous memory. The last columns, one
per step of a chunk, take the new tokens: there all rows write the same column. `merge` moves them
behind each row's tokens once per chunk.

Other columns at or beyond a row's length are garbage by contract: readers mask by length. On TPUs
the layout is `sdjax.rollout.paged` instead; `attend_step` and `finish` are the one interface of
both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sdjax.models.config import ModelConfig
from sdjax.parallel import ACT_RULES, sharding
from sdjax.rollout import paged

LETTERS = {"k": "BNCS", "v": "BNSC", "k_scale": "BNS", "v_scale": "BNS", "kv": "BSNC"}
Layer = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Shape of the cache without its rows and columns; `dtype` is float32, bfloat16 or int8.

    `pages` chooses the layout of `sdjax.rollout.paged`, which knows no int8.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    pages: bool = False

    @classmethod
    def of(
        cls, cfg: ModelConfig, dtype: str, layout: str = "rows", backend: str | None = None
    ) -> CacheSpec:
        """The cache of a model; `layout` is "rows", "pages", or "auto": pages where they pay.

        `backend` is the platform to plan for, if not the one this process has.
        """
        if layout == "auto":
            on_tpu = (backend or jax.default_backend()) == "tpu"
            kernel = on_tpu and paged.supported(cfg.head_dim, dtype)
            layout = "pages" if kernel else "rows"
        if layout == "pages" and dtype == "int8":
            raise ValueError("rollout.cache_layout='pages' has no int8: use 'rows' or 'auto'")
        return cls(cfg.n_layers, cfg.n_kv_heads, cfg.head_dim, dtype, layout == "pages")

    @property
    def quantised(self) -> bool:
        """Whether keys and values are int8 with one float32 scale per token and head."""
        return self.dtype == "int8"

    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one layer's arrays."""
        if self.pages:
            shape = (rows, length, 2 * self.n_kv_heads, self.head_dim)
            return {"kv": jax.ShapeDtypeStruct(shape, self.dtype)}
        sizes = {"B": rows, "N": self.n_kv_heads, "C": self.head_dim, "S": length}
        shape = lambda name: tuple(sizes[letter] for letter in LETTERS[name])
        out = {name: jax.ShapeDtypeStruct(shape(name), self.dtype) for name in ("k", "v")}
        if self.quantised:
            for name in ("k_scale", "v_scale"):
                out[name] = jax.ShapeDtypeStruct(shape(name), jnp.float32)
        return out

    def nbytes(self, rows: int, length: int) -> int:
        """Bytes of the whole cache."""
        layer = self.shapes(rows, length).values()
        return self.n_layers * sum(leaf.size * leaf.dtype.itemsize for leaf in layer)


def shardings(spec: CacheSpec, mesh: Mesh) -> dict[str, Any]:
    """Placement of one layer's arrays: rows over data and fsdp, key-value heads over tensor."""
    return {name: sharding(mesh, LETTERS[name], ACT_RULES) for name in spec.shapes(1, 1)}


def pack(
    k_BTNC: Float[Array, "B T N C"], v_BTNC: Float[Array, "B T N C"], spec: CacheSpec
) -> Layer:
    """Fresh keys and values in the layout and dtype of the cache."""
    if spec.pages:
        return {"kv": paged.interleave(k_BTNC, v_BTNC).astype(spec.dtype)}
    return store(k_BTNC, v_BTNC, spec.dtype)


def store(k_BTNC: Array, v_BTNC: Array, dtype: Any) -> Layer:
    """Turns keys and values into the cache's layout and casts or quantises them."""
    k_BNCS, v_BNSC = k_BTNC.transpose(0, 2, 3, 1), v_BTNC.transpose(0, 2, 1, 3)
    if jnp.dtype(dtype) != jnp.int8:
        return {"k": k_BNCS.astype(dtype), "v": v_BNSC.astype(dtype)}
    k_int, k_scale_BNS = _quantise(k_BNCS, 2)
    v_int, v_scale_BNS = _quantise(v_BNSC, 3)
    return {"k": k_int, "v": v_int, "k_scale": k_scale_BNS, "v_scale": v_scale_BNS}


def _quantise(x: Array, axis: int) -> tuple[Array, Array]:
    """Symmetric int8 over the channels of one token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-20) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), scale.squeeze(axis)


def attend_step(
    q_B1HC: Float[Array, "B 1 H C"],
    k_B1NC: Float[Array, "B 1 N C"],
    v_B1NC: Float[Array, "B 1 N C"],
    layer: Layer,
    place: Place,
    window: int | None,
) -> tuple[Float[Array, "B 1 H C"], Layer]:
    """Stores one new token per row and attends to it and all before it."""
    if "kv" in layer:
        at_B = place.length_B + place.step
        layer = {"kv": paged.write(layer["kv"], k_B1NC, v_B1NC, at_B)}
        return paged.attend(q_B1HC, layer["kv"], at_B + 1, window), layer
    layer = write(layer, k_B1NC, v_B1NC, place)
    return attend(q_B1HC, layer, place.masks[window]), layer


def finish(layer: Layer, length_B: Int[Array, " B"], chunk: int) -> Layer:
    """The cache after a chunk, with its tokens behind each row's."""
    return layer if "kv" in layer else merge(layer, length_B, chunk)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the new tokens of a step go: behind `length_B` cached tokens and `step` of the chunk.

    `masks` are those of `mask` for every kind of window, empty for pages.
    """

    length_B: Int[Array, " B"]
    step: Int[Array, ""]
    chunk: int
    masks: dict[int | None, Array]

    @classmethod
    def of(cls, layer: Layer, length_B, step, chunk: int, windows: set[int | None]) -> Place:
        """The place of this step in caches like `layer`."""
        if "kv" in layer:
            return cls(length_B, step, chunk, {})
        columns = layer["k"].shape[3]
        masks = {w: mask(length_B, step, columns, chunk, w) for w in windows}
        return cls(length_B, step, chunk, masks)


def write(layer: Layer, k_B1NC: Array, v_B1NC: Array, place: Place) -> Layer:
    """Writes one step's keys and values to that step's column, of the last ones."""
    fresh = store(k_B1NC, v_B1NC, layer["k"].dtype)

    def one(name: str) -> Array:
        axis = LETTERS[name].index("S")
        column = layer[name].shape[axis] - place.chunk + place.step
        return lax.dynamic_update_slice_in_dim(layer[name], fresh[name], column, axis)

    return {name: one(name) for name in layer}


def mask(
    length_B: Int[Array, " B"], step: Int[Array, ""], columns: int, chunk: int, window: int | None
) -> Float[Array, "B S"]:
    """What a row's new token sees, as terms to add to its scores: 0 where it sees, -inf elsewhere.

    Columns below `length_B` and those of the chunk's steps up to `step`; of these tokens the last
    `window`. Once per step and kind of window, not per layer: comparing is dearer than adding.
    """
    column_S = jnp.arange(columns)
    step_S = column_S - (columns - chunk)  # of the chunk, negative before it
    seen_BS = jnp.where(step_S < 0, column_S < length_B[:, None], step_S <= step)
    if window is not None:
        age_BS = jnp.where(step_S < 0, (length_B + step)[:, None] - column_S, step - step_S)
        seen_BS &= age_BS < window
    return jnp.where(seen_BS, 0.0, -jnp.inf).astype(jnp.float32)


def attend(
    q_B1HC: Float[Array, "B 1 H C"], layer: Layer, mask_BS: Float[Array, "B S"]
) -> Float[Array, "B 1 H C"]:
    """Attention of one new token per row over the cache, where `mask` lets it see.

    Scores and softmax in float32.
    """
    B, _, H, C = q_B1HC.shape
    N = layer["k"].shape[1]
    dtype = q_B1HC.dtype
    q_BNGC = (q_B1HC * C**-0.5).reshape(B, N, H // N, C)
    score = jnp.einsum("bngc,bncs->bngs", q_BNGC, layer["k"].astype(dtype)).astype(jnp.float32)
    if "k_scale" in layer:
        score = score * layer["k_scale"][:, :, None]
    score = score + mask_BS[:, None, None]
    weight = jnp.exp(score - score.max(-1, keepdims=True))
    total_BNG1 = weight.sum(-1, keepdims=True)
    if "v_scale" in layer:
        weight = weight * layer["v_scale"][:, :, None]
    out = jnp.einsum("bngs,bnsc->bngc", weight.astype(dtype), layer["v"].astype(dtype))
    return (out / total_BNG1.astype(dtype)).reshape(B, 1, H, C)


def merge(layer: Layer, length_B: Int[Array, " B"], chunk: int) -> Layer:
    """Moves the chunk's keys and values from the last columns behind each row's tokens.

    Needs length + chunk <= S for every row; columns of steps that a row did not live to see are
    garbage beyond its length.
    """
    place = jax.vmap(lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))

    def one(name: str) -> Array:
        old, axis = layer[name], LETTERS[name].index("S")
        fresh = lax.slice_in_dim(old, old.shape[axis] - chunk, None, axis=axis)
        return place(old, fresh, length_B, axis - 1)

    return {name: one(name) for name in layer}


def insert(
    layer: Layer,
    prompts: Layer,
    source_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    fill_B: Bool[Array, " B"],
) -> Layer:
    """Copies a prompt to the start of each row b where `fill_B`.

    It begins at column `start_B[b]` of row `source_B[b]` of `prompts`; what lies behind it there is
    copied too, and is garbage as all beyond a row's length.
    """

    def one(name: str) -> Array:
        old, axis = layer[name], LETTERS[name].index("S")
        width = min(prompts[name].shape[axis], old.shape[axis])
        padding = [(0, width if i == axis else 0) for i in range(old.ndim)]
        row_PX = jnp.pad(prompts[name], padding)  # no slice is moved back from the end
        cut = lambda row, start: lax.dynamic_slice_in_dim(row_PX[row], start, width, axis - 1)
        chosen = jax.vmap(cut)(source_B, start_B)
        fill = fill_B.reshape(-1, *[1] * (old.ndim - 1))
        kept = lax.slice_in_dim(old, 0, width, axis=axis)
        return lax.dynamic_update_slice_in_dim(old, jnp.where(fill, chosen, kept), 0, axis)

    return {name: one(name) for name in layer}


def resize(layer: Layer, row_B: Int[Array, " B"], length: int) -> Layer:
    """The cache of rows `row_B` with `length` columns; what does not fit is cut off."""

    def one(name: str) -> Array:
        old, axis = layer[name], LETTERS[name].index("S")
        old = jnp.take(old, row_B, axis=0)
        if length <= old.shape[axis]:
            return lax.slice_in_dim(old, 0, length, axis=axis)
        widths = [(0, length - old.shape[axis] if i == axis else 0) for i in range(old.ndim)]
        return jnp.pad(old, widths)

    return {name: one(name) for name in layer}
