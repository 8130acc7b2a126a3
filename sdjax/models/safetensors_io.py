"""Reading slices out of safetensors files, and writing them, without mapping them into memory.

A mapped file counts as resident memory while its pages are touched, and cannot be read from a
bucket; ranges read on demand can. bfloat16 through ml_dtypes.
"""

from __future__ import annotations

import itertools
import json
import math
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
CACHE_LINE, CACHE_WAY = 64, 1024  # bytes
MOST_BUFFERS = 1024  # of one system call (IOV_MAX)


class Scratch(threading.local):
    """A buffer per thread that reads go through: fresh memory would cost more than the reading."""

    def __init__(self):
        self._buffer = np.empty(0, np.uint8)

    def take(self, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
        """Memory for [rows, columns], valid until the same thread takes again.

        Rows are not a multiple of `CACHE_WAY` bytes apart: a column's entries would share few sets
        of the processor's cache, and transposing would take twice as long.
        """
        used = columns * dtype.itemsize
        stride = used if used % CACHE_WAY else used + CACHE_LINE
        if self._buffer.nbytes < rows * stride:
            self._buffer = np.empty(rows * stride, np.uint8)
        return self._buffer[: rows * stride].reshape(rows, stride)[:, :used].view(dtype)


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
        self._read(start, [out])
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

    def read_rows(self, name: str, start: int, out: np.ndarray, column: int = 0) -> None:
        """Fills `out` [rows, columns] with a tensor's rows from `start` on, from `column` on.

        `out` has the dtype that is stored, and its rows are contiguous, but may lie apart. Of a
        bucket whole rows are fetched, since a request for each would take longer.
        """
        row_bytes = math.prod(self.shapes[name][1:]) * out.dtype.itemsize
        begin = self._start + self._header[name]["data_offsets"][0] + start * row_bytes
        skip, width = column * out.dtype.itemsize, out.shape[1] * out.dtype.itemsize
        if width == row_bytes:
            data = (out.reshape(-1) if out.flags.c_contiguous else out).view(np.uint8)
            self._read(begin, [data] if data.ndim == 1 else list(data))
        elif is_remote(self.path):
            whole = np.empty((len(out), row_bytes), np.uint8)
            self._read(begin, [whole.reshape(-1)])
            out.view(np.uint8)[...] = whole[:, skip : skip + width]
        else:
            for i, row in enumerate(out.view(np.uint8)):
                self._read(begin + i * row_bytes + skip, [row])


def _range_reader(path: str) -> Callable[[int, list[np.ndarray]], None]:
    """A function that fills arrays of bytes, one after the other, from a place in a file on."""
    if is_remote(path):
        import fsspec

        fs, url = fsspec.core.url_to_fs(path)

        def read_remote(start: int, buffers: list[np.ndarray]) -> None:
            stop = start + sum(len(b) for b in buffers)
            data = np.frombuffer(fs.cat_file(url, start=start, end=stop), np.uint8)
            if len(data) < stop - start:
                raise _cut_short(path, start + len(data))
            ends = itertools.accumulate(len(b) for b in buffers)
            for end, buffer in zip(ends, buffers, strict=True):
                buffer[:] = data[end - len(buffer) : end]

        return read_remote

    file = open(path, "rb", buffering=0)  # closed with the reader

    def read(start: int, buffers: list[np.ndarray]) -> None:
        while buffers:
            some = buffers[:MOST_BUFFERS]
            count = os.preadv(file.fileno(), some, start)
            if not count:
                raise _cut_short(path, start)
            start += count
            buffers = _unfilled(some, count) + buffers[MOST_BUFFERS:]

    return read


def _unfilled(buffers: list[np.ndarray], count: int) -> list[np.ndarray]:
    """What remains to be filled of `buffers` after their first `count` bytes."""
    if count == sum(map(len, buffers)):
        return []
    ends = itertools.accumulate(map(len, buffers))
    missing = [max(0, end - count) for end in ends]
    return [b[max(0, len(b) - n) :] for b, n in zip(buffers, missing, strict=True) if n]


def _cut_short(path: str, byte: int) -> ValueError:
    return ValueError(f"{path} is cut short at byte {byte}: fetch it again")


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
