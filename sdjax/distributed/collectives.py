"""Small exchanges of host values between processes: collectives, and identities when alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.distributed.cluster import StartupError


def allgather_host(values: Any) -> np.ndarray:
    """Stacks every process's array (same shape and dtype everywhere) on a new first axis."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).reshape(
        (jax.process_count(), *np.shape(values))
    )


def allgather_objects(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of the processes; sizes may differ."""
    if jax.process_count() == 1:
        return [value]
    payload = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = allgather_host(np.int64(payload.size).astype(np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: payload.size] = payload
    rows = allgather_host(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Process 0's JSON value, in every process."""
    return allgather_objects(value if jax.process_index() == 0 else None)[0]


def agree_max(values: Sequence[int]) -> list[int]:
    """Elementwise maximum over the processes: for shapes that all must share."""
    return [int(v) for v in allgather_host(np.asarray(values, np.int32)).max(axis=0)]


def merge_metrics(
    metrics: Mapping[str, float], summed: tuple[str, ...] = (), largest: tuple[str, ...] = ()
) -> dict[str, float]:
    """One dict from each process's: means, but sums and maxima of names with these prefixes.

    A name that some processes lack is merged over those that have it. What is already the same
    everywhere stays exactly as it is.
    """
    everyone = allgather_objects(dict(metrics))
    out = {}
    for name in sorted({name for one in everyone for name in one}):
        values = [one[name] for one in everyone if name in one]
        if name.startswith(summed):
            out[name] = sum(values)
        elif name.startswith(largest):
            out[name] = max(values)
        elif all(value == values[0] for value in values):
            out[name] = values[0]
        else:
            out[name] = float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
    return out


def global_batch(tree: Any, shardings: Any) -> Any:
    """One global array from each process's local rows; `shardings` is a tree or a single sharding.

    Every process passes the same shapes. Alone this is `jax.device_put`.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, s: jax.make_array_from_process_local_data(s, np.asarray(x)), tree, shardings
    )


def check_same(what: str, value: str) -> None:
    """Raises StartupError in all processes when `value` is not the same everywhere. Collective.

    For facts that are known only after jax is up: device kinds, shapes, the text of a program.
    """
    values = allgather_objects(value)
    odd = [i for i, v in enumerate(values) if v != values[0]]
    if odd:
        raise StartupError(
            f"{what} of process {', '.join(map(str, odd[:8]))} differs from process 0's: "
            f"{_first_difference(values[odd[0]], values[0])}; start all with the same hardware, "
            "code and config"
        )


def _first_difference(theirs: str, ours: str) -> str:
    """The neighbourhood of the first character in which two texts differ."""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
    at = min(len(theirs), len(ours)) if at is None else at
    start = max(0, at - 30)
    return f"{theirs[start : at + 50]!r} instead of {ours[start : at + 50]!r}"
