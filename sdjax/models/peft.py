"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

A few MB instead of the whole model; `peft.PeftModel.from_pretrained(base, folder)` opens it.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import jax
import numpy as np

from sdjax.models.config import ModelConfig
from sdjax.models.hf import DTYPES, LAYER_NAMES, fetch
from sdjax.models.safetensors_io import write
from sdjax.types import Params


def save_adapters(
    path: str, cfg: ModelConfig, params: Params, base_model: str, dtype: str = "float32"
) -> None:
    """Writes the adapters of `params` as a folder, atomically; all processes must call it.

    `base_model` is the path or hub name of the model they belong to. ValueError without adapters.
    """
    adapters = params["layers"].get("lora")
    if adapters is None:
        raise ValueError("there are no adapters to save: model.lora.rank is 0; export the model")
    tensors = {}
    for name, adapter in adapters.items():
        a, b = fetch(adapter["a"]), fetch(adapter["b"])
        rank = a.shape[-1]
        module = LAYER_NAMES[name][0].removesuffix(".weight")
        for i in range(cfg.n_layers):
            prefix = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = a[i].reshape(-1, rank).T
            tensors[f"{prefix}.lora_B.weight"] = b[i].reshape(rank, -1).T
    if jax.process_index() == 0:
        _write(pathlib.Path(path), cfg, tensors, base_model, DTYPES[dtype])


def _write(target: pathlib.Path, cfg: ModelConfig, tensors, base_model: str, dtype: np.dtype):
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        shapes = {name: (x.shape, dtype) for name, x in tensors.items()}
        write(file, shapes, (x.astype(dtype) for x in tensors.values()))
    config = {
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
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
