"""Reading slices out of safetensors files, and writing them, without mapping them into memory.

A mapped file counts as resident memory while its pages are touched, and cannot be read from a
bucket; ranges read on demand can. bfloat16 through ml_dtypes.
"""

from __future__ import annotations

import json
import os
import struct
import threading
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


class Scratch(threading.local):
    """A buffer per thread that reads go through: fresh memory would cost more than the reading."""

    def __init__(self):
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` of memory, valid until the same thread takes again."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


class SafetensorsFile:
    """One file, local or in a bucket: `shapes` by tensor name, and rows read on demand."""

    def __init__(self, path: str):
        self.path = path
        self._read = _range_reader(path)
        (length,) = struct.unpack("<Q", self._bytes(0, 8))
        if length > 100_000_000:
            raise ValueError(
                f"{path} is not a safetensors file: its header would be {length} bytes"
            )
        header = json.loads(self._bytes(8, 8 + length))
        header.pop("__metadata__", None)
        self._header = header
        self._start = 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def _bytes(self, start: int, stop: int) -> bytes:
        out = np.empty(stop - start, np.uint8)
        self._read(start, out)
        return out.tobytes()

    def dtype(self, name: str) -> np.dtype:
        """The dtype a tensor is stored in. ValueError when it is not a floating one we know."""
        stored = self._header[name]["dtype"]
        if stored not in DTYPES:
            raise ValueError(
                f"tensor {name} of {self.path} is stored as {stored}: sdjax reads "
                f"{', '.join(DTYPES)}; quantised weights are not implemented"
            )
        return DTYPES[stored]

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> np.ndarray:
        """Rows start:stop of a tensor's first axis, in the stored dtype, in memory of `scratch`."""
        shape, dtype = self.shapes[name], self.dtype(name)
        begin, end = self._header[name]["data_offsets"]
        row = (end - begin) // shape[0]
        data = scratch.take((stop - start) * row)
        self._read(self._start + begin + start * row, data)
        return data.view(dtype).reshape(stop - start, *shape[1:])


def _range_reader(path: str) -> Callable[[int, np.ndarray], None]:
    """A function that fills an array of bytes from a place in a file on."""
    if is_remote(path):
        import fsspec

        fs, file = fsspec.core.url_to_fs(path)

        def read_remote(start: int, out: np.ndarray) -> None:
            out[:] = np.frombuffer(fs.cat_file(file, start=start, end=start + out.nbytes), np.uint8)

        return read_remote

    def read(start: int, out: np.ndarray) -> None:
        view = memoryview(out)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{path} is cut short at byte {file.tell()}: fetch it again")
                view = view[count:]

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
