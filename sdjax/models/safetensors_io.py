"""Reading slices out of safetensors files, and writing them, without mapping them into memory.

A mapped file counts as resident memory while its pages are touched, and cannot be read from a
bucket; ranges read on demand can. bfloat16 through ml_dtypes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sdjax.data.hub import is_remote

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One file, local or in a bucket: `shapes` by tensor name, and rows read on demand."""

    def __init__(self, path: str):
        self.path = path
        self._read = _range_reader(path)
        (length,) = struct.unpack("<Q", self._read(0, 8))
        if length > 100_000_000:
            raise ValueError(
                f"{path} is not a safetensors file: its header would be {length} bytes"
            )
        header = json.loads(self._read(8, 8 + length))
        header.pop("__metadata__", None)
        self._header = header
        self._start = 8 + length

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the file."""
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype a tensor is stored in. ValueError when it is not a floating one we know."""
        stored = self._header[name]["dtype"]
        if stored not in DTYPES:
            raise ValueError(
                f"tensor {name} of {self.path} is stored as {stored}: sdjax reads "
                f"{', '.join(DTYPES)}; quantised weights are not implemented"
            )
        return DTYPES[stored]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of a tensor's first axis, in the stored dtype."""
        shape, dtype = self.shapes[name], self.dtype(name)
        begin, end = self._header[name]["data_offsets"]
        if not shape:
            return np.frombuffer(self._read(self._start + begin, self._start + end), dtype)[0]
        stop = shape[0] if stop is None else stop
        row = (end - begin) // max(shape[0], 1)
        data = self._read(self._start + begin + start * row, self._start + begin + stop * row)
        return np.frombuffer(data, dtype).reshape(stop - start, *shape[1:])


def _range_reader(path: str) -> Callable[[int, int], bytes]:
    """A function that returns bytes start:stop of a file."""
    if is_remote(path):
        import fsspec

        fs, file = fsspec.core.url_to_fs(path)
        return lambda start, stop: fs.cat_file(file, start=start, end=stop)

    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise ValueError(
                f"{path} is cut short: bytes {start}:{stop} are missing; fetch it again"
            )
        return data

    return read


def write(
    file: BinaryIO,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterable[np.ndarray],
) -> None:
    """Writes one file; `values` come in the order of `tensors`, one in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for (shape, dtype), value in zip(tensors.values(), values, strict=True):
        assert value.shape == shape and value.dtype == dtype, (value.shape, shape)
        file.write(np.ascontiguousarray(value).tobytes())
    file.flush()
    os.fsync(file.fileno())
