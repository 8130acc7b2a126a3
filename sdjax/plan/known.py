"""Architectures that can be planned for without a network: the fields of their config.json.

After the published config.json files; parameter counts are tested against published sizes.
Only what changes shapes and FLOPs is kept; a folder or hub name with a config.json goes first.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from sdjax.data import hub
from sdjax.models.config import ModelConfig


def _qwen3(d_model: int, d_ff: int, layers: int, heads: int, tie: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 40960,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "allenai/Olmo-3-7B-Instruct": {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_theta": 5e5,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "max_position_embeddings": 65536,
    },
}


def model_config(path: str) -> ModelConfig:
    """The architecture of config.model.path: known by name, else read from its config.json."""
    if path in KNOWN:
        return ModelConfig.from_hf(KNOWN[path])
    folder = pathlib.Path(hub.PACKAGED.get(path, pathlib.Path(path).expanduser()))
    file = folder / "config.json"
    if not file.is_file() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        file = _fetch(path)
    if not file.is_file():
        raise ValueError(
            f"config.model.path={path!r} has no config.json: give a folder, a name on the hub, or "
            f"one of {', '.join(KNOWN)}"
        )
    return ModelConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))


def _fetch(name: str) -> pathlib.Path:
    """The config.json of a hub model alone, not its weights."""
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"config.model.path={name!r} is not known to the planner and the hub did not give its "
            f"config.json ({type(error).__name__}): give a folder that holds it"
        ) from error
