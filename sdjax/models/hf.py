"""Hugging Face folders in and out: sharded import tensor by tensor, and atomic export.

Each process reads only the slices that its devices own, each once; the host holds its shards of the
largest stacked leaf besides what the devices keep. PyTorch is never needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sdjax.data import hub
from sdjax.models import lora as lora_lib
from sdjax.models.config import ModelConfig
from sdjax.models.decoder import is_spec, param_shardings, param_specs
from sdjax.models.leaf import Leaf, bounds_of, read_shards
from sdjax.models.safetensors_io import SafetensorsFile, Scratch, write
from sdjax.parallel import single_device_mesh
from sdjax.types import Params

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 4 * 2**30  # of one safetensors file, so that a file can be copied and retried
READERS = max(2, min(8, os.cpu_count() or 1))  # threads; they also hide a bucket's latency
INDEX = "model.safetensors.index.json"
# leaf -> (name within "model.layers.{i}.", how many of its axes, after L, the product sums over)
LAYER_NAMES = {
    "w_q": ("self_attn.q_proj.weight", 1),
    "w_k": ("self_attn.k_proj.weight", 1),
    "w_v": ("self_attn.v_proj.weight", 1),
    "w_o": ("self_attn.o_proj.weight", 2),
    "w_gate": ("mlp.gate_proj.weight", 1),
    "w_up": ("mlp.up_proj.weight", 1),
    "w_down": ("mlp.down_proj.weight", 1),
    "b_q": ("self_attn.q_proj.bias", 0),
    "b_k": ("self_attn.k_proj.bias", 0),
    "b_v": ("self_attn.v_proj.bias", 0),
    "b_o": ("self_attn.o_proj.bias", 0),
    "b_gate": ("mlp.gate_proj.bias", 0),
    "b_up": ("mlp.up_proj.bias", 0),
    "b_down": ("mlp.down_proj.bias", 0),
    "q_norm": ("self_attn.q_norm.weight", 0),
    "k_norm": ("self_attn.k_norm.weight", 0),
}
NORM_NAMES = {  # by ModelConfig.post_norm
    False: {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"},
    True: {
        "attn_norm": "post_attention_layernorm.weight",
        "mlp_norm": "post_feedforward_layernorm.weight",
    },
}
TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
}
DERIVED = ("rotary_emb.inv_freq",)  # tables that old checkpoints store and nobody needs


def leaves(cfg: ModelConfig) -> list[Leaf]:
    """Every leaf of the parameter pytree of `cfg` with its tensor names."""
    layer_names = LAYER_NAMES | {k: (v, 0) for k, v in NORM_NAMES[cfg.post_norm].items()}
    out = []
    for path, spec in jax.tree_util.tree_flatten_with_path(param_specs(cfg), is_leaf=is_spec)[0]:
        keys = tuple(p.key for p in path)
        if keys[0] == "layers":
            suffix, n_inputs = layer_names[keys[1]]
            names = tuple(f"model.layers.{i}.{suffix}" for i in range(cfg.n_layers))
            out.append(Leaf(keys, spec.shape, names, n_inputs, stacked=True))
        else:
            out.append(Leaf(keys, spec.shape, (TOP_NAMES[keys[0]],), 0, stacked=False))
    return out


def load_config(path: str) -> ModelConfig:
    """The ModelConfig of a model's folder, bucket URL or hub name."""
    folder = hub.resolve(path)
    text = hub.read_text(folder, "config.json")
    if text is None:
        raise ValueError(f"model.path={path!r}: {folder} has no config.json")
    return ModelConfig.from_hf(json.loads(text))


def load(path: str, mesh: Mesh | None = None, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """Reads config and weights; every parameter arrives sharded over `mesh` as `dtype` (float32).

    Without a mesh everything goes to one device. Raises ValueError listing by name all tensors that
    are missing, unexpected or of another shape than config.json says.
    """
    folder = hub.resolve(path)
    cfg = load_config(path)
    dtype = _parameter_dtype(dtype)
    shardings = param_shardings(cfg, single_device_mesh() if mesh is None else mesh)
    files = _open_files(folder)
    wanted = leaves(cfg)
    _check_names(cfg, wanted, files, folder)
    params: Params = {}
    scratch = Scratch()
    with ThreadPoolExecutor(READERS) as pool:
        for leaf in wanted:
            place = functools.reduce(lambda node, key: node[key], leaf.path, shardings)
            bounds = functools.partial(bounds_of, leaf.shape)
            owned = map(bounds, place.addressable_devices_indices_map(leaf.shape).values())
            shards = read_shards(leaf, owned, files, dtype, pool, scratch)
            parent = params
            for key in leaf.path[:-1]:
                parent = parent.setdefault(key, {})
            parent[leaf.path[-1]] = jax.make_array_from_callback(
                leaf.shape, place, lambda index, shards=shards, bounds=bounds: shards[bounds(index)]
            )
    return cfg, params


def _parameter_dtype(dtype: Any) -> np.dtype:
    """One of DTYPES from its name or type; weights in a whole-number dtype would all be 0."""
    wanted = np.float32 if dtype is None else dtype
    try:
        wanted = np.dtype(wanted)
    except TypeError:
        pass  # an unknown name: refused below
    if wanted not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} of the parameters: choose one of {', '.join(DTYPES)}")
    return wanted


def _open_files(folder: str) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it, from the index or from model.safetensors."""
    text = hub.read_text(folder, INDEX)
    names = sorted(set(json.loads(text)["weight_map"].values())) if text else ["model.safetensors"]
    by_tensor: dict[str, SafetensorsFile] = {}
    for name in names:
        try:
            file = SafetensorsFile(f"{folder}/{name}")
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} has no {name}: sdjax reads safetensors only (not PyTorch .bin files)"
            ) from error
        by_tensor |= dict.fromkeys(file.shapes, file)
    return by_tensor


def _check_names(cfg: ModelConfig, wanted, files: Mapping[str, SafetensorsFile], folder) -> None:
    expected = {name: leaf.stored_shape for leaf in wanted for name in leaf.names}
    missing = sorted(set(expected) - set(files))
    tied = {TOP_NAMES["head"]} if cfg.tie_embeddings else set()
    unexpected = sorted(
        name for name in set(files) - set(expected) - tied if not name.endswith(DERIVED)
    )
    misshaped = [
        f"{name} is {files[name].shapes[name]}, should be {shape}"
        for name, shape in expected.items()
        if name in files and files[name].shapes[name] != shape
    ]
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json; {'; '.join(problems)}"
        )


def save(
    path: str,
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` opens; adapters are merged. All processes must call it.

    Process 0 writes into a folder beside `path` and renames it at the end, so `path` is complete
    or absent. `dtype` is float32, bfloat16 or float16. A bucket URL gets config.json last instead.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} of the export: choose one of {', '.join(DTYPES)}")
    params = lora_lib.merge(params, cfg)
    writer = jax.process_index() == 0
    with finished_folder(path, writer) as folder:
        _save_weights(folder, cfg, params, DTYPES[dtype], shard_bytes, writer)
        if writer:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_json(folder / "generation_config.json", _generation(cfg, generation_config))
            write_json(folder / "config.json", cfg.to_hf(dtype))


@contextlib.contextmanager
def finished_folder(path: str, writer: bool) -> Iterator[pathlib.Path]:
    """A folder to write into that becomes `path` at the end, and is removed on an error.

    Of several processes only the `writer` may touch it. An older folder at `path` is replaced.
    """
    remote = hub.is_remote(path)
    if remote:
        hub.check_bucket(path)  # before the work, not after it
    target = pathlib.Path("sdjax_export" if remote else path)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if not writer:
        yield folder
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        _upload(folder, path) if remote else _replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_weights(folder, cfg, params, dtype: np.dtype, shard_bytes: int, writer: bool) -> None:
    """Streams the tensors into one file, or several with an index, layer by layer."""
    groups: list[list[tuple[Leaf, int, str]]] = [[]]
    size = total = 0
    for leaf, i, name in _in_file_order(cfg):
        nbytes = math.prod(leaf.stored_shape) * dtype.itemsize
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append((leaf, i, name))
        size += nbytes
        total += nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = "model.safetensors" if len(groups) == 1 else file
        weight_map |= {name: file for _, _, name in group}
        values = (_fetch(leaf, i, params, dtype) for leaf, i, _ in group)
        if writer:
            with open(folder / file, "wb") as out:
                write(out, {name: (leaf.stored_shape, dtype) for leaf, _, name in group}, values)
        else:
            for _ in values:  # every process takes part in gathering a tensor
                pass
    if writer and len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _in_file_order(cfg: ModelConfig) -> Iterator[tuple[Leaf, int, str]]:
    """(leaf, layer, tensor name), layer by layer."""
    all_leaves = leaves(cfg)
    for leaf in all_leaves:
        if not leaf.stacked:
            yield leaf, 0, leaf.names[0]
    for i in range(cfg.n_layers):
        for leaf in all_leaves:
            if leaf.stacked:
                yield leaf, i, leaf.names[i]


def _fetch(leaf: Leaf, i: int, params: Params, dtype: np.dtype) -> np.ndarray:
    """One tensor on the host, in the file's layout; gathers it when its shards are spread."""
    array = functools.reduce(lambda tree, key: tree[key], leaf.path, params)
    return leaf.to_stored(fetch(array[i] if leaf.stacked else array)).astype(dtype)


def fetch(array: jax.Array) -> np.ndarray:
    """A whole array on the host of every process; collective when its shards are on several."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _generation(cfg: ModelConfig, given: Mapping[str, Any] | None) -> dict[str, Any]:
    eos = list(cfg.eos_token_ids)
    own = {
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": cfg.pad_token_id,
    }
    return own | dict(given or {})


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes JSON as people like to read it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a finished folder in its place; an older export there is moved away first."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _upload(folder: pathlib.Path, url: str) -> None:
    """Copies a folder into a bucket, its config last: without it nobody opens the rest.

    The configs and weights of an older export go first: its index would be read with new weights.
    """
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    old = [file for file in fs.ls(root, detail=False) if fs.isfile(file)] if fs.exists(root) else []
    for file in sorted(old, key=lambda f: not f.endswith("config.json")):
        if file.endswith(("config.json", ".safetensors", INDEX)):
            fs.rm_file(file)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda f: f.name == "config.json"):
        name = f"{root}/{file.relative_to(folder).as_posix()}"
        fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(file), name)
