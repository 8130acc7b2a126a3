"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

A few MB instead of the whole model; `peft.PeftModel.from_pretrained(base, folder)` opens it.
"""

from __future__ import annotations

from typing import Any

import jax

from sdjax.models.config import ModelConfig
from sdjax.models.hf import DTYPES, LAYER_NAMES, fetch, finished_folder, write_json
from sdjax.models.safetensors_io import write
from sdjax.types import Params


def save_adapters(
    path: str, cfg: ModelConfig, params: Params, base_model: str, dtype: str = "float32"
) -> None:
    """Writes the adapters of `params` as a folder, atomically; all processes must call it.

    `path` may be a bucket URL. `base_model` is the path or hub name of the model they belong to.
    ValueError without adapters.
    """
    adapters = params["layers"].get("lora")
    if adapters is None:
        raise ValueError("there are no adapters to save: model.lora.rank is 0; export the model")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of the adapters: choose one of {', '.join(DTYPES)}")
    tensors = {}
    for name, adapter in adapters.items():
        a, b = fetch(adapter["a"]), fetch(adapter["b"])
        rank = a.shape[-1]
        module = LAYER_NAMES[name][0].removesuffix(".weight")
        for i in range(cfg.n_layers):
            prefix = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = a[i].reshape(-1, rank).T
            tensors[f"{prefix}.lora_B.weight"] = b[i].reshape(rank, -1).T
    writer = jax.process_index() == 0
    with finished_folder(path, writer) as folder:
        if writer:
            shapes = {name: (x.shape, DTYPES[dtype]) for name, x in tensors.items()}
            with open(folder / "adapter_model.safetensors", "wb") as file:
                write(file, shapes, (x.astype(DTYPES[dtype]) for x in tensors.values()))
            write_json(folder / "adapter_config.json", _config(cfg, base_model))


def _config(cfg: ModelConfig, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": cfg.lora.dropout,
        "target_modules": [f"{target}_proj" for target in cfg.lora.targets],
        "bias": "none",
        "inference_mode": True,
    }
