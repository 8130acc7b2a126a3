"""Packs the responses of a mini-batch into rows of several sequences. numpy only.

A response brings one student sequence (prompt + response) and, when it has a teacher, one teacher
sequence (teacher prompt + the same response); both go to the same row number, so that nothing is
exchanged between devices when hidden states are gathered. Responses with a teacher share rows, the
others fill what is left there and then rows of their own, for which the step runs no teacher. The
last response token is never an input: nothing is predicted from it. Shapes come from `PackingSpec`,
of which a run uses few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

ROW_FRACTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)  # of the longest row, as buckets
TEACHER_RATIOS = (*np.arange(1.0, 3.0, 0.125), 3.0, 4.0, 6.0, 8.0)  # teacher row / student row
SLOT_FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # response slots / student row
KEEP_BUCKET = 1.15  # a known bucket is reused while it costs at most so many times the best one
ALIGN = 64  # row lengths are multiples of it (of 8 when shorter), for attention blocks


@dataclasses.dataclass(frozen=True)
class PackItem:
    """One response as the trainer sees it; arrays are per response token.

    `advantage` is a number or one per token; `weight` and `distill_weight` are the response's
    aggregation weights (`objectives.aggregation.response_weights`). `teacher_prompt_tokens` None
    leaves it out of distillation, `old_logp` None says that the policy has not changed since.
    """

    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    sampler_logp: np.ndarray
    weight: float
    advantage: float | np.ndarray = 0.0
    teacher_prompt_tokens: np.ndarray | None = None
    distill_weight: float = 0.0
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(student tokens, teacher tokens, response slots) that it takes of a row."""
        response = len(self.response_tokens)
        student = len(self.prompt_tokens) + response - 1
        if self.teacher_prompt_tokens is None:
            return student, 0, response
        return student, len(self.teacher_prompt_tokens) + response - 1, response


@dataclasses.dataclass(frozen=True, order=True)
class PackingSpec:
    """Shapes of a packed batch: A micro-batches of `micro_rows` rows.

    `teacher_row_len` 0 means no teacher rows. The step loops over the micro-batches that hold
    something, so spare ones cost memory only.
    """

    micro_batches: int
    micro_rows: int
    row_len: int
    teacher_row_len: int
    slots: int

    @property
    def rows(self) -> int:
        """Rows of all micro-batches."""
        return self.micro_batches * self.micro_rows

    def merge(self, other: PackingSpec) -> PackingSpec:
        """The smallest spec with room for both: hosts agree on one shape this way."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return PackingSpec(*(max(a, b) for a, b in pairs))


def align(n: int) -> int:
    """Rounds up to a multiple of 64, or of 8 below 64."""
    step = ALIGN if n > ALIGN else 8
    return -(-max(n, 1) // step) * step


def place(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Best-fit decreasing: items [n, 3] into rows of `capacity`, each dimension at most full.

    Items with teacher tokens come first, so that rows without any are as many as can be. Raises
    ValueError naming the first item that does not fit into an empty row.
    """
    capacity = np.asarray(capacity, np.int64)
    too_long = np.flatnonzero((sizes > capacity).any(-1))
    if too_long.size:
        i = int(too_long[0])
        raise ValueError(
            f"response {i} takes {sizes[i].tolist()} (student tokens, teacher tokens, slots), more "
            f"than a row's {capacity.tolist()}: raise config.batch.row_len or teacher_row_len"
        )
    share = sizes / np.maximum(capacity, 1)
    rows: list[list[int]] = []
    free = np.empty((len(sizes), 3), np.int64)
    for i in np.lexsort((-share.max(-1), sizes[:, 1] == 0)):
        left = free[: len(rows)] - sizes[i]
        fits = (left >= 0).all(-1)
        if fits.any():
            room = np.where(sizes[i] > 0, left / np.maximum(capacity, 1), 0.0).max(-1)
            best = int(np.flatnonzero(fits)[np.argmin(room[fits])])
        else:
            best = len(rows)
            rows.append([])
            free[best] = capacity
        rows[best].append(int(i))
        free[best] -= sizes[i]
    return rows


def _spec_for(
    sizes: np.ndarray, row_len: int, teacher_row_len: int, micro_rows: int
) -> PackingSpec:
    """The spec of rows of `row_len`, with teacher rows in proportion and as few slots as needed."""
    taught = sizes[sizes[:, 1] > 0]
    if teacher_row_len == 0 and taught.size:
        student, teacher, _ = taught.sum(0)
        wanted = max(taught[:, 1].max(), row_len * teacher / student)
        ratios = [r for r in TEACHER_RATIOS if align(int(r * row_len)) >= wanted]
        teacher_row_len = align(int((ratios[0] if ratios else wanted / row_len + 1) * row_len))
    rows = place(sizes, (row_len, teacher_row_len, row_len))
    used = max(int(sizes[row, 2].sum()) for row in rows)
    slots = next(align(int(f * row_len)) for f in SLOT_FRACTIONS if align(int(f * row_len)) >= used)
    micro = -(-len(rows) // micro_rows)
    return PackingSpec(micro, micro_rows, row_len, teacher_row_len, slots)


def cost(sizes: np.ndarray, spec: PackingSpec) -> int:
    """Tokens that the models read, in whole micro-batches: what a bucket is judged by."""
    rows = place(sizes, _capacity(spec))
    taught = sum(bool(sizes[row, 1].any()) for row in rows)
    whole = lambda n: -(-n // spec.micro_rows) * spec.micro_rows
    return whole(len(rows)) * spec.row_len + whole(taught) * spec.teacher_row_len


def choose_spec(
    items: Sequence[PackItem],
    *,
    micro_rows: int,
    row_len: int = 0,
    teacher_row_len: int = 0,
    known: Sequence[PackingSpec] = (),
) -> PackingSpec:
    """The cheapest bucket for these responses, or one of `known` that is nearly as cheap.

    `row_len` is the longest row allowed (0: the longest sequence here), `teacher_row_len` fixes the
    teacher's (0: in proportion to the student's). The number of micro-batches is rounded up to a
    power of two, and spare ones are not computed.
    """
    sizes = np.array([item.sizes for item in items], np.int64)
    longest = int(sizes[:, 0].max())
    limit = align(max(row_len, longest))
    lengths = sorted({align(int(f * limit)) for f in ROW_FRACTIONS} | {limit})
    lengths = [n for n in lengths if n >= longest]
    candidates = [_spec_for(sizes, n, teacher_row_len, micro_rows) for n in lengths]
    best = min(candidates, key=lambda spec: (cost(sizes, spec), -spec.row_len))
    usable = [s for s in known if s.micro_rows == micro_rows and _fits(sizes, s)]
    if usable:
        kept = min(usable, key=lambda spec: cost(sizes, spec))
        if cost(sizes, kept) <= KEEP_BUCKET * cost(sizes, best):
            return kept
    return dataclasses.replace(best, micro_batches=1 << (best.micro_batches - 1).bit_length())


def _capacity(spec: PackingSpec) -> tuple[int, int, int]:
    return spec.row_len, spec.teacher_row_len, spec.slots


def _fits(sizes: np.ndarray, spec: PackingSpec) -> bool:
    """Whether all items fit into the spec's rows."""
    if (sizes > np.array(_capacity(spec))).any():
        return False
    return len(place(sizes, _capacity(spec))) <= spec.rows


def pack(
    items: Sequence[PackItem], spec: PackingSpec, *, skip_first: int = 0, prefix_len: int = 0
) -> Any:
    """The mini-batch as a PackedBatch of numpy arrays, every response exactly once.

    Rows with a teacher come first, among them those with many slots: the rows of one micro-batch
    have similar numbers of slots, and the last micro-batches need no teacher.
    Outside skip_first <= t < prefix_len (0: no end) a token's distill_weight is 0. Raises
    ValueError when the items do not fit into `spec` or disagree on having `old_logp` or `ref_logp`.
    """
    sizes = np.array([item.sizes for item in items], np.int64)
    rows = place(sizes, _capacity(spec))
    if len(rows) > spec.rows:
        raise ValueError(
            f"{len(items)} responses need {len(rows)} rows of {_capacity(spec)}, but the spec has "
            f"{spec.rows}: choose the spec from these responses"
        )
    rows.sort(key=lambda row: _row_order(sizes[row]))
    batch = _empty(spec, items)
    for b, row in enumerate(rows):
        _fill_row(batch, b, [items[i] for i in row], skip_first, prefix_len)
    return _build(batch, spec)


def _row_order(sizes: np.ndarray) -> tuple[bool, int]:
    """Sorts a row of items [n, 3] by whether nobody in it has a teacher, then by its slots."""
    return not sizes[:, 1].any(), -int(sizes[:, 2].sum())


def _same_presence(items: Sequence[PackItem], name: str) -> bool:
    """Whether all items have the field, or none."""
    present = {getattr(item, name) is not None for item in items}
    if len(present) > 1:
        raise ValueError(f"some responses of the mini-batch have {name} and some have not")
    return present == {True}


def _empty(spec: PackingSpec, items: Sequence[PackItem]) -> dict[str, np.ndarray | None]:
    """Arrays of zeros [rows, ...], None for what the batch does not carry."""
    rows, slots = spec.rows, spec.slots
    out: dict[str, np.ndarray | None] = {}
    for side, length in (("student", spec.row_len), ("teacher", spec.teacher_row_len)):
        for name in ("tokens", "segment_ids", "positions"):
            out[f"{side}_{name}"] = np.zeros((rows, length), np.int32) if length else None
    for name in ("targets", "student_index", "teacher_index", "position"):
        out[name] = np.zeros((rows, slots), np.int32)
    for name in ("weight", "distill_weight", "advantage", "sampler_logp"):
        out[name] = np.zeros((rows, slots), np.float32)
    for name in ("old_logp", "ref_logp"):
        present = _same_presence(items, name)
        out[name] = np.zeros((rows, slots), np.float32) if present else None
    out["mask"] = np.zeros((rows, slots), bool)
    return out


def _fill_row(
    batch: dict[str, Any], b: int, items: Sequence[PackItem], skip_first: int, prefix_len: int
) -> None:
    """Writes the items of row b one after the other."""
    at = {"student": 0, "teacher": 0}
    slot = 0
    for segment, item in enumerate(items, start=1):
        count = len(item.response_tokens)
        here = np.s_[b, slot : slot + count]
        time = np.arange(count)
        for side, prompt in (
            ("student", item.prompt_tokens),
            ("teacher", item.teacher_prompt_tokens),
        ):
            if prompt is None:
                continue
            tokens = np.concatenate([prompt, item.response_tokens[:-1]])
            span = np.s_[b, at[side] : at[side] + len(tokens)]
            batch[f"{side}_tokens"][span] = tokens
            batch[f"{side}_segment_ids"][span] = segment
            batch[f"{side}_positions"][span] = np.arange(len(tokens))
            batch[f"{side}_index"][here] = at[side] + len(prompt) - 1 + time
            at[side] += len(tokens)
        inside = time >= skip_first
        inside &= time < prefix_len if prefix_len else True
        distilled = inside & (item.teacher_prompt_tokens is not None)
        batch["targets"][here] = item.response_tokens
        batch["position"][here] = time
        batch["mask"][here] = True
        batch["weight"][here] = item.weight
        batch["distill_weight"][here] = np.where(distilled, item.distill_weight, 0.0)
        batch["advantage"][here] = item.advantage
        batch["sampler_logp"][here] = item.sampler_logp
        for name in ("old_logp", "ref_logp"):
            if batch[name] is not None:
                batch[name][here] = getattr(item, name)
        slot += count


def _build(batch: dict[str, Any], spec: PackingSpec) -> Any:
    """Splits rows into micro-batches [A, B, ...] and puts them into the dataclasses."""
    from sdjax.types import PackedBatch, PackedRows  # jax types, imported only where they are built

    def cut(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else x.reshape(spec.micro_batches, spec.micro_rows, x.shape[-1])

    cut_batch = {name: cut(x) for name, x in batch.items()}
    names = ("tokens", "segment_ids", "positions")
    sides = {
        side: PackedRows(**{name: cut_batch.pop(f"{side}_{name}") for name in names})
        for side in ("student", "teacher")
    }
    if not spec.teacher_row_len:
        sides["teacher"] = None
    return PackedBatch(**sides, **cut_batch)


def unpack(values: np.ndarray, batch: Any, items: Sequence[PackItem], spec: PackingSpec) -> list:
    """Per-slot values [A, B, R] of a packed batch back to one array per item, in item order.

    `spec` and `items` must be those that `pack` was called with.
    """
    sizes = np.array([item.sizes for item in items], np.int64)
    rows = place(sizes, _capacity(spec))
    rows.sort(key=lambda row: _row_order(sizes[row]))
    flat = np.asarray(values).reshape(spec.rows, spec.slots)
    out: list = [None] * len(items)
    for b, row in enumerate(rows):
        slot = 0
        for i in row:
            count = len(items[i].response_tokens)
            out[i] = flat[b, slot : slot + count]
            slot += count
    return out


def waste(batch: Any) -> dict[str, float]:
    """Fractions of row capacity that hold nothing, over the micro-batches that hold something.

    "slots", "student" and "teacher"; of the teacher's, micro-batches without any teacher do not
    count, because the step runs none for them.
    """
    filled = {"slots": np.asarray(batch.mask)}
    for side in ("student", "teacher"):
        rows = getattr(batch, side)
        if rows is not None:
            filled[side] = np.asarray(rows.segment_ids) > 0
    out = {}
    for name, x in filled.items():
        used = x.any((1, 2))
        out[name] = 1.0 - float(x[used].mean()) if used.any() else 0.0
    return out
