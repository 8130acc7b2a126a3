"""A pretrained model in two lines, for notebooks and scripts.

    model = sdjax.models.from_pretrained("Qwen/Qwen3-0.6B")
    logits_BTV = model.logits(tokens_BT)

The training loop uses the parts (`hf.load`, `decoder`) directly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sdjax.data import chat, hub
from sdjax.models import decoder, hf
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
        restart at 0 with each segment.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        segment_ids_BT = jnp.asarray(segment_ids_BT)
        if positions_BT is None:
            positions_BT = segment_positions(segment_ids_BT)
        scope = contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        with scope:
            return _logits(
                self.params, tokens_BT, segment_ids_BT, jnp.asarray(positions_BT), self.cfg
            )


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
    """Loads a folder, bucket URL, hub name or "tiny"; parameters in `dtype` (float32)."""
    cfg, params = hf.load(path, mesh, dtype)
    folder = hub.resolve(path)
    text = hub.read_text(folder, "generation_config.json")
    generation = {"eos_token_id": list(cfg.eos_token_ids)} | (json.loads(text) if text else {})
    has_tokenizer = hub.read_text(folder, "tokenizer_config.json") is not None
    tokenizer = chat.load_tokenizer(path) if has_tokenizer else None
    return Model(cfg, params, tokenizer, generation, mesh)
