"""Hugging Face folders in and out: sharded import tensor by tensor, and atomic export.

Each process reads only the rows that its devices own; the host holds the largest stacked leaf's
shard besides what the devices keep. PyTorch is never needed.
"""

from __future__ import annotations

import dataclasses
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
ROWS = 4096  # of an embedding read at a time
ALIGNMENT = 64  # bytes
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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter pytree and the tensors it is made of.

    `names` has one tensor name per layer, or a single one for a leaf without an L axis. A matrix is
    stored [outputs, inputs] and used [inputs..., outputs...]: `n_inputs` counts our leading axes
    that are its inputs, 0 for what is stored as it is used.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    n_inputs: int
    stacked: bool

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Our shape of one tensor."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the file."""
        inputs, outputs = self.layer_shape[: self.n_inputs], self.layer_shape[self.n_inputs :]
        if self.n_inputs:
            return (math.prod(outputs), math.prod(inputs))
        return (math.prod(self.layer_shape),) if self.stacked else self.shape

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """Our tensor of one layer in the file's layout."""
        k = self.n_inputs
        axes = (*range(k, x.ndim), *range(k))
        return x.transpose(axes).reshape(self.stored_shape)


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
    dtype = np.dtype(np.float32 if dtype is None else dtype)
    shardings = param_shardings(cfg, single_device_mesh() if mesh is None else mesh)
    files = _open_files(folder)
    wanted = leaves(cfg)
    _check_names(cfg, wanted, files, folder)
    params: Params = {}
    scratch = Scratch()
    with ThreadPoolExecutor(READERS) as pool:
        for leaf in wanted:
            place = functools.reduce(lambda node, key: node[key], leaf.path, shardings)
            cache: dict[tuple, np.ndarray] = {}  # replicas of a shard are read once

            def shard(index, leaf=leaf, cache=cache):
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
                if bounds not in cache:
                    cache[bounds] = _read_shard(leaf, bounds, files, dtype, pool, scratch)
                return cache[bounds]

            parent = params
            for key in leaf.path[:-1]:
                parent = parent.setdefault(key, {})
            parent[leaf.path[-1]] = jax.make_array_from_callback(leaf.shape, place, shard)
    return cfg, params


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


def _read_shard(
    leaf: Leaf,
    bounds,
    files: Mapping[str, SafetensorsFile],
    dtype: np.dtype,
    pool: ThreadPoolExecutor,
    scratch: Scratch,
) -> np.ndarray:
    """The part `bounds` ((start, stop) per axis) of a leaf, in our layout, in parallel."""
    out = _aligned_empty([stop - start for start, stop in bounds], dtype)
    (first, last), rest = bounds[0], bounds[1:]

    def read_layer(i: int) -> None:
        name = leaf.names[i]
        _read_part(out[i - first], leaf, name, rest, files[name], scratch)

    def read_rows(start: int) -> None:
        name, stop = leaf.names[0], min(start + ROWS, last)
        part = out[start - first : stop - first]
        _read_part(part, leaf, name, ((start, stop), *rest), files[name], scratch)

    jobs = (
        (read_layer, range(first, last)) if leaf.stacked else (read_rows, range(first, last, ROWS))
    )
    for _ in pool.map(*jobs):  # iterated, so that errors surface
        pass
    return out


def _aligned_empty(shape, dtype: np.dtype) -> np.ndarray:
    """Memory that jax on the CPU takes over as it is instead of copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read_part(
    out: np.ndarray, leaf: Leaf, name: str, bounds, file: SafetensorsFile, scratch: Scratch
) -> None:
    """Fills `out` with a part of one tensor: reads rows, cuts the other axes and reorders them."""
    k = leaf.n_inputs
    inputs, outputs = leaf.layer_shape[:k], leaf.layer_shape[k:]
    stored_axes = outputs + inputs
    (start, stop), *others = (*bounds[k:], *bounds[:k])
    columns = math.prod(leaf.stored_shape[1:])
    per_row = math.prod(stored_axes[1:]) // columns  # stored rows per entry of our first axis
    dtype = file.dtype(name)
    if not k and dtype == out.dtype and out.shape == (stop - start, *stored_axes[1:]):
        file.read_rows(name, start * per_row, out.reshape(-1, columns))  # stored as used
        return
    rows = scratch.take((stop - start) * per_row, columns, dtype)
    file.read_rows(name, start * per_row, rows)
    x = rows.reshape(stop - start, *stored_axes[1:])
    x = x[(slice(None), *(slice(a, b) for a, b in others))]
    n_out = len(outputs)
    out[...] = x.transpose((*range(n_out, x.ndim), *range(n_out)))


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
    remote = hub.is_remote(path)
    target = pathlib.Path("sdjax_export" if remote else path)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if writer:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _save_weights(folder, cfg, params, DTYPES[dtype], shard_bytes, writer)
    if writer:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_json(folder / "generation_config.json", _generation(cfg, generation_config))
        _write_json(folder / "config.json", cfg.to_hf(dtype))
        _upload(folder, path) if remote else _replace(folder, target)


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
        _write_json(folder / INDEX, index)


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


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a finished folder in its place; an older export there is moved away first."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _upload(folder: pathlib.Path, url: str) -> None:
    """Copies a folder into a bucket, config.json last: without it nobody opens the rest."""
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda f: f.name == "config.json"):
        fs.put_file(str(file), f"{root}/{file.name}")
    shutil.rmtree(folder)
