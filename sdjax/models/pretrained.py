"""A pretrained model in two lines, for notebooks and scripts.

    model = sdjax.models.from_pretrained("Qwen/Qwen3-0.6B")
    logits_BTV = model.logits(tokens_BT)

The training loop uses the parts (`hf.load`, `decoder`) directly.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sdjax.data import chat, hub
from sdjax.models import decoder, hf
from sdjax.models.attention import LANES
from sdjax.models.config import ModelConfig
from sdjax.types import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """Config, parameters, tokenizer (None where the folder has none) and generation_config.json."""

    cfg: ModelConfig
    params: Params
    tokenizer: Any
    generation: dict[str, Any]
    mesh: Mesh | None

    def logits(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of every position; computes in the parameters' dtype.

        Segment 0 is padding. Without segment ids a row is one sequence; without positions they
        restart at 0 with each segment. Any number of rows and tokens fits any mesh. ValueError for
        tokens outside the vocabulary and for arrays that do not match.
        """
        tokens_BT = _checked(tokens_BT, self.cfg.vocab_size)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        segment_ids_BT = _like(tokens_BT, segment_ids_BT, "segment_ids")
        if positions_BT is None:
            positions_BT = segment_positions(segment_ids_BT)
        positions_BT = _like(tokens_BT, positions_BT, "positions")
        arrays = (tokens_BT, segment_ids_BT, positions_BT)
        if self.mesh is None:
            return _logits(self.params, *arrays, self.cfg)
        (B, T), (rows, tokens) = tokens_BT.shape, _multiples(self.mesh)
        fill = ((0, -B % rows), (0, -T % tokens))
        with jax.set_mesh(self.mesh):
            logits_BTV = _logits(self.params, *(jnp.pad(x, fill) for x in arrays), self.cfg)
        return logits_BTV if fill == ((0, 0), (0, 0)) else logits_BTV[:B, :T]


def _checked(tokens_BT: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Tokens as an array [B, T]; lookups would silently clamp what is outside the vocabulary."""
    tokens_BT = jnp.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(
            f"tokens are {tokens_BT.dtype}{list(tokens_BT.shape)}, should be whole numbers [rows, "
            "tokens]: put a single sequence into a list of its own"
        )
    if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.is_fully_addressable:
        ids = np.asarray(tokens_BT)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(
                f"tokens lie between {ids.min()} and {ids.max()}, but the vocabulary has "
                f"{vocab_size} entries: is this another model's tokenizer?"
            )
    return tokens_BT


def _like(tokens_BT: Array, value: Any, name: str) -> Int[Array, "B T"]:
    value = jnp.asarray(value)
    if value.shape != tokens_BT.shape:
        raise ValueError(
            f"{name} are {list(value.shape)}, tokens {list(tokens_BT.shape)}: they must agree"
        )
    return value


def _multiples(mesh: Mesh) -> tuple[int, int]:
    """What the rows and the tokens of a batch must be multiples of to be split over `mesh`."""
    context = mesh.shape["context"]
    return mesh.shape["data"] * mesh.shape["fsdp"], context * LANES if context > 1 else 1


def segment_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 wherever the segment changes."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    previous = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start = jnp.where(segment_ids_BT != previous, index, 0)
    return index - jax.lax.cummax(start, axis=1)


@functools.partial(jax.jit, static_argnums=4)
def _logits(params, tokens_BT, segment_ids_BT, positions_BT, cfg):
    dtype = params["embed"].dtype
    hidden_BTD = decoder.hidden_states(
        params, tokens_BT, segment_ids_BT, positions_BT, cfg, compute_dtype=dtype
    )
    return decoder.logits(params, hidden_BTD, cfg)


def from_pretrained(path: str, mesh: Mesh | None = None, dtype: Any = None) -> Model:
    """Loads a folder, bucket URL, hub name or "tiny"; parameters in `dtype` (float32).

    `dtype` is float32, bfloat16 or float16, as a name or a type. ValueError says what is wrong with
    the path, the config or the weights.
    """
    cfg, params = hf.load(path, mesh, dtype)
    folder = hub.resolve(path)
    text = hub.read_text(folder, "generation_config.json")
    listed = {k: v for k, v in json.loads(text or "{}").items() if v is not None}
    generation = {"eos_token_id": list(cfg.eos_token_ids)} | listed
    has_tokenizer = hub.read_text(folder, "tokenizer_config.json") is not None
    tokenizer = chat.load_tokenizer(path) if has_tokenizer else None
    return Model(cfg, params, tokenizer, generation, mesh)
