"""One leaf of the parameter pytree as the tensors of a checkpoint, and reading parts of it.

Knows layouts and slices, not the names of any family: those are in `hf`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sdjax.models.safetensors_io import SafetensorsFile, Scratch

ROWS = 4096  # of an embedding read at a time
ALIGNMENT = 64  # bytes
Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis


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

    @property
    def n_row_axes(self) -> int:
        """How many of the axes, outputs first, make up the rows of the file's matrix."""
        if self.n_inputs:
            return len(self.layer_shape) - self.n_inputs
        return len(self.layer_shape) - len(self.stored_shape) + 1

    def outputs_first(self, axes: tuple) -> tuple:
        """Something per axis of one tensor, in the file's order."""
        return (*axes[self.n_inputs :], *axes[: self.n_inputs])

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """Our tensor of one layer in the file's layout."""
        k = self.n_inputs
        axes = (*range(k, x.ndim), *range(k))
        return x.transpose(axes).reshape(self.stored_shape)


def bounds_of(shape: tuple[int, ...], index: tuple[slice, ...]) -> Bounds:
    """(start, stop) of each axis from a tuple of slices."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def read_shards(
    leaf: Leaf,
    owned: Iterable[Bounds],
    files: Mapping[str, SafetensorsFile],
    dtype: np.dtype,
    pool: ThreadPoolExecutor,
    scratch: Scratch,
) -> dict[Bounds, np.ndarray]:
    """The parts of a leaf that this process owns, in our layout, in parallel.

    Parts that lie in the same rows of the file (split along its columns) are read together.
    """
    out = {b: _aligned_empty([stop - start for start, stop in b], dtype) for b in owned}
    together = collections.defaultdict(list)
    for bounds in out:
        layers, tensor = (bounds[0], bounds[1:]) if leaf.stacked else (None, bounds)
        together[layers, leaf.outputs_first(tensor)[0]].append(bounds)
    jobs = []
    for (layers, (start, stop)), group in together.items():
        if leaf.stacked:
            jobs += [(i, start, stop, group) for i in range(*layers)]
        else:
            jobs += [(0, at, min(at + ROWS, stop), group) for at in range(start, stop, ROWS)]

    def read(job: tuple[int, int, int, list[Bounds]]) -> None:
        i, start, stop, group = job
        parts = []
        for bounds in group:
            first = bounds[0][0]
            if leaf.stacked:
                parts.append((out[bounds][i - first], leaf.outputs_first(bounds[1:])[1:]))
            else:
                parts.append((out[bounds][start - first : stop - first], bounds[1:]))
        _read_parts(parts, leaf, leaf.names[i], start, stop, files[leaf.names[i]], scratch)

    for _ in pool.map(read, jobs):  # iterated, so that errors surface
        pass
    return out


def _aligned_empty(shape, dtype: np.dtype) -> np.ndarray:
    """Memory that jax on the CPU takes over as it is instead of copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read_parts(
    parts: list[tuple[np.ndarray, Bounds]],
    leaf: Leaf,
    name: str,
    start: int,
    stop: int,
    file: SafetensorsFile,
    scratch: Scratch,
) -> None:
    """Fills arrays, each with the bounds of its axes after the first one in the file's order.

    `start` and `stop` are those of the first. Reads no column that none of them needs.
    """
    axes = leaf.outputs_first(leaf.layer_shape)
    inner = leaf.n_row_axes - 1  # of the rows' axes, those after the first are never split
    per_entry = math.prod(axes[1 : 1 + inner])
    shape, first, column = (stop - start, *axes[1:]), 0, 0
    if len(axes) > 1 + inner:  # the first of the columns' axes may be split
        first = min(bounds[inner][0] for _, bounds in parts)
        last = max(bounds[inner][1] for _, bounds in parts)
        column = first * math.prod(axes[2 + inner :])
        shape = (*shape[: 1 + inner], last - first, *axes[2 + inner :])
    rows, columns = shape[0] * per_entry, math.prod(shape[1 + inner :])
    dtype = file.dtype(name)
    out = parts[0][0]
    if not leaf.n_inputs and dtype == out.dtype and out.shape == shape:  # stored as it is used
        file.read_rows(name, start * per_entry, out.reshape(rows, columns), column)
        return
    data = scratch.take(rows, columns, dtype)
    file.read_rows(name, start * per_entry, data, column)
    data = data.reshape(shape)
    n = len(axes) - leaf.n_inputs
    for out, bounds in parts:
        cut = [slice(a, b) for a, b in bounds]
        if first:
            cut[inner] = slice(bounds[inner][0] - first, bounds[inner][1] - first)
        x = data[(slice(None), *cut)]
        out[...] = x.transpose((*range(n, x.ndim), *range(n)))
