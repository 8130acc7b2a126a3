"""Packs waiting prompts into the rows of a prefill batch. NumPy only.

Several prompts share a row, so that little of a batch is padding, whatever their lengths. Of the
few shapes that are compiled, the one is taken that gets the most prompt tokens for its cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

BATCH_COST = 64  # tokens' worth of time that any batch takes: dispatch, and reading the weights
ROW_COST = 4096  # columns of a row at which attention costs as much as all else


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts side by side: [P, T] each of int32.

    `index_PT` is a token's place in its prompt, `segment_PT` numbers the prompts of a row from 1; 0
    is padding. `places` has (row, column of the first token) of the prompts taken, by their index
    in what was given to `pack`.
    """

    tokens_PT: np.ndarray
    index_PT: np.ndarray
    segment_PT: np.ndarray
    places: dict[int, tuple[int, int]]


def pack(
    prompts: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]], pad_id: int
) -> PromptBatch:
    """The first prompt and as many of the others as the best of `shapes` (rows, columns) takes.

    No prompt may be longer than the longest row.
    """
    sizes = [len(prompt) for prompt in prompts]
    options = [(shape, _places(sizes, shape)) for shape in shapes if shape[1] >= sizes[0]]
    (rows, columns), places = max(options, key=lambda option: _worth(sizes, *option))
    batch = PromptBatch(
        tokens_PT=np.full((rows, columns), pad_id, np.int32),
        index_PT=np.zeros((rows, columns), np.int32),
        segment_PT=np.zeros((rows, columns), np.int32),
        places=places,
    )
    for i, (row, start) in places.items():
        cells = row, slice(start, start + sizes[i])
        batch.tokens_PT[cells] = prompts[i]
        batch.index_PT[cells] = np.arange(sizes[i])
        batch.segment_PT[cells] = batch.segment_PT[row].max() + 1
    return batch


def _places(sizes: list[int], shape: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """(row, column) of the prompts that fit: the first, then of its followers the longest first.

    Only as many followers compete as the shape could hold, so that no prompt waits for long.
    """
    rows, columns = shape
    ahead = int(np.searchsorted(np.cumsum(sizes), rows * columns, side="right"))
    followers = sorted(range(1, max(1, ahead)), key=lambda i: -sizes[i])
    free_P, places = np.full(rows, columns), {}
    for i in (0, *followers):
        row = int(np.argmax(free_P >= sizes[i]))
        if free_P[row] >= sizes[i]:
            places[i] = row, int(columns - free_P[row])
            free_P[row] -= sizes[i]
    return places


def _worth(sizes: list[int], shape: tuple[int, int], places: dict) -> tuple[float, float]:
    """Prompt tokens for what the batch costs, then the cheaper one."""
    rows, columns = shape
    cost = BATCH_COST + rows * columns * (1 + columns / ROW_COST)
    return sum(sizes[i] for i in places) / cost, -cost
