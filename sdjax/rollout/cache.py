"""The KV cache of the sampling engine: layout, growth, and the tokens a decode chunk adds to it.

One dict per layer, so that a decode step never slices a stack. Keys are [B, N, C, S] and values [B,
N, S, C]: both products of decode attention then run over contiguous memory. A decode chunk reads
the cache without writing to it and collects its own keys and values in a small buffer, where all
rows write the same column; `merge` moves them behind each row's tokens once per chunk.

Columns at or beyond a row's length are garbage by contract: readers mask by length. On TPUs the
layout is `sdjax.rollout.paged` instead; `begin`, `attend_step` and `finish` are the one interface
of both.
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
    return store(k_BTNC.transpose(0, 2, 3, 1), v_BTNC.transpose(0, 2, 1, 3), spec)


def store(k_BNCS: Array, v_BNSC: Array, spec: CacheSpec) -> Layer:
    """Casts or quantises keys and values that already have the cache's layout."""
    if not spec.quantised:
        return {"k": k_BNCS.astype(spec.dtype), "v": v_BNSC.astype(spec.dtype)}
    k_int, k_scale_BNS = _quantise(k_BNCS, 2)
    v_int, v_scale_BNS = _quantise(v_BNSC, 3)
    return {"k": k_int, "v": v_int, "k_scale": k_scale_BNS, "v_scale": v_scale_BNS}


def _quantise(x: Array, axis: int) -> tuple[Array, Array]:
    """Symmetric int8 over the channels of one token and head."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-20) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), scale.squeeze(axis)


def begin(layer: Layer, spec: CacheSpec, chunk: int, dtype: Any) -> Layer:
    """What the steps of a chunk write to: a small buffer, or the pages themselves."""
    if spec.pages:
        return layer
    return recent(spec, layer["k"].shape[0], chunk, dtype)


def attend_step(
    q_B1HC: Float[Array, "B 1 H C"],
    k_B1NC: Float[Array, "B 1 N C"],
    v_B1NC: Float[Array, "B 1 N C"],
    layer: Layer,
    state: Layer,
    place: Place,
    window: int | None,
) -> tuple[Float[Array, "B 1 H C"], Layer]:
    """Stores one new token per row in the chunk's state and attends to it and all before it."""
    if "kv" in layer:
        at_B = place.length_B + place.step
        state = {"kv": paged.write(state["kv"], k_B1NC, v_B1NC, at_B)}
        return paged.attend(q_B1HC, state["kv"], at_B + 1, window), state
    state = remember(state, k_B1NC, v_B1NC, place.step)
    return attend(q_B1HC, layer, state, *place.masks[window]), state


def finish(layer: Layer, state: Layer, length_B: Int[Array, " B"], spec: CacheSpec) -> Layer:
    """The cache with the chunk's tokens in it."""
    return state if spec.pages else merge(layer, state, length_B, spec)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the new tokens of a step go: behind `length_B` cached tokens and `step` of the chunk.

    `masks` are those of `masks` for every kind of window, empty for pages.
    """

    length_B: Int[Array, " B"]
    step: Int[Array, ""]
    masks: dict[int | None, tuple[Array, Array]]

    @classmethod
    def of(cls, layer: Layer, length_B, step, chunk: int, windows: set[int | None]) -> Place:
        """The place of this step in caches like `layer`."""
        if "kv" in layer:
            return cls(length_B, step, {})
        columns = layer["k"].shape[3]
        return cls(length_B, step, {w: masks(length_B, step, columns, chunk, w) for w in windows})


def recent(spec: CacheSpec, rows: int, chunk: int, dtype: Any) -> Layer:
    """An empty buffer for the keys and values of one decode chunk, in compute precision."""
    N, C = spec.n_kv_heads, spec.head_dim
    return {
        "k": jnp.zeros((rows, N, C, chunk), dtype),
        "v": jnp.zeros((rows, N, chunk, C), dtype),
    }


def remember(buffer: Layer, k_B1NC: Array, v_B1NC: Array, step: Int[Array, ""]) -> Layer:
    """Writes one step's keys and values to column `step` of the chunk's buffer."""
    k_BNC1 = k_B1NC.transpose(0, 2, 3, 1).astype(buffer["k"].dtype)
    v_BN1C = v_B1NC.transpose(0, 2, 1, 3).astype(buffer["v"].dtype)
    return {
        "k": lax.dynamic_update_slice_in_dim(buffer["k"], k_BNC1, step, 3),
        "v": lax.dynamic_update_slice_in_dim(buffer["v"], v_BN1C, step, 2),
    }


def masks(
    length_B: Int[Array, " B"], step: Int[Array, ""], columns: int, chunk: int, window: int | None
) -> tuple[Float[Array, "B S"], Float[Array, " I"]]:
    """What a row's new token sees, as terms to add to its scores: 0 where it sees, -inf elsewhere.

    Columns below `length_B` of the cache and columns up to `step` of the buffer, of these the last
    `window`. Once per step and kind of window, not per layer: comparing is dearer than adding.
    """
    seen_BS = jnp.arange(columns) < length_B[:, None]
    seen_I = jnp.arange(chunk) <= step
    if window is not None:
        age_BS = (length_B + step)[:, None] - jnp.arange(columns)
        seen_BS, seen_I = seen_BS & (age_BS < window), seen_I & (step - jnp.arange(chunk) < window)
    hide = lambda seen: jnp.where(seen, 0.0, -jnp.inf).astype(jnp.float32)
    return hide(seen_BS), hide(seen_I)


def attend(
    q_B1HC: Float[Array, "B 1 H C"],
    layer: Layer,
    buffer: Layer,
    old_mask_BS: Float[Array, "B S"],
    new_mask_I: Float[Array, " I"],
) -> Float[Array, "B 1 H C"]:
    """Attention of one new token per row over its cached tokens and the chunk's, itself included.

    The masks are those of `masks`. Scores and softmax in float32.
    """
    B, _, H, C = q_B1HC.shape
    N = layer["k"].shape[1]
    q_BNGC = (q_B1HC * C**-0.5).reshape(B, N, H // N, C)

    old = jnp.einsum("bngc,bncs->bngs", q_BNGC, layer["k"].astype(q_BNGC.dtype))
    old = old.astype(jnp.float32)
    if "k_scale" in layer:
        old = old * layer["k_scale"][:, :, None]
    new = jnp.einsum("bngc,bncs->bngs", q_BNGC, buffer["k"]).astype(jnp.float32)
    old, new = old + old_mask_BS[:, None, None], new + new_mask_I

    top = jnp.maximum(old.max(-1, keepdims=True), new.max(-1, keepdims=True))
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total_BNG1 = old.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
    if "v_scale" in layer:
        old = old * layer["v_scale"][:, :, None]
    dtype = q_B1HC.dtype
    out = jnp.einsum("bngs,bnsc->bngc", old.astype(dtype), layer["v"].astype(dtype))
    out = out + jnp.einsum("bngs,bnsc->bngc", new.astype(dtype), buffer["v"])
    return (out / total_BNG1.astype(dtype)).reshape(B, 1, H, C)


def merge(layer: Layer, buffer: Layer, length_B: Int[Array, " B"], spec: CacheSpec) -> Layer:
    """Moves the chunk's keys and values behind each row's tokens.

    Needs length + chunk <= S for every row; columns of steps that a row did not live to see are
    garbage beyond its length.
    """
    fresh = store(buffer["k"], buffer["v"], spec)
    place = jax.vmap(lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))
    return {
        name: place(old, fresh[name], length_B, LETTERS[name].index("S") - 1)
        for name, old in layer.items()
    }


def insert(
    layer: Layer,
    prompts: Layer,
    source_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    fill_B: Bool[Array, " B"],
) -> Layer:
    """Copies the prompt at column `start_B[b]` of row `source_B[b]` of `prompts` to the start of
    row b, where `fill_B`; what lies behind the prompt there is copied with it.
    """

    def one(name: str) -> Array:
        old, axis = layer[name], LETTERS[name].index("S")
        width = min(prompts[name].shape[axis], old.shape[axis])
        padding = [(0, width if i == axis else 0) for i in range(old.ndim)]
        row_PX = jnp.pad(prompts[name], padding)  # no slice is moved back from the end
        cut = lambda row, start: lax.dynamic_slice_in_dim(row_PX[row], start, width, axis - 1)
        chosen = jax.vmap(cut)(source_B, start_B)
        fill = fill_B.reshape(-1, *[1] * (old.ndim - 1))
        start = lax.slice_in_dim(old, 0, width, axis=axis)
        return lax.dynamic_update_slice_in_dim(old, jnp.where(fill, chosen, start), 0, axis)

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
