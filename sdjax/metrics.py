"""Writes what a run measures: metrics.jsonl, TensorBoard events, text samples; process 0 only.

    metrics.jsonl   a flat JSON object per write: {"step": 3, "wall_time": ..., "loss/total": 0.1}
    samples.jsonl   one object per text sample: {"step": 3, "name": "rollout/0", "text": "..."}
    tensorboard/    the same numbers and texts as events

Keys are `area/name`; a number that is not finite is written as null, so that the file stays plain
JSON, and read back as NaN. Continuing a run removes the rows of the steps that will be done again,
and a last line cut in half by a kill. What the numbers mean is decided by the callers, except for
`rollout_metrics`, which summarises sampled responses. The display is in `sdjax.progress`.

A bucket (gs://...) cannot be appended to: there the files are written to a local folder and copied
whenever `flush` is called and every minute.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sdjax import distributed
from sdjax.analysis import epistemic
from sdjax.records import Rollout

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_DIR = "tensorboard"
EVALUATED = "time/eval_s"  # in the rows that hold an evaluation
COPY_EVERY_S = 60.0  # to a bucket


class MetricsWriter:
    """Appends to a workdir's metrics files; every method does nothing on processes other than 0.

    `resume_step` is the step of the checkpoint that training goes on from: later rows are removed.
    None starts afresh and removes all rows. Whatever belongs to a step must be written, and `flush`
    called, before the checkpoint of that step is saved.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        enabled: bool | None = None,
    ):
        self._enabled = _is_process_zero() if enabled is None else enabled
        self._events = None
        if not self._enabled:
            return
        self._bucket = _Bucket(workdir) if "://" in os.fspath(workdir) else None
        self._dir = self._bucket.local if self._bucket else pathlib.Path(workdir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _open_trimmed(self._dir / METRICS_FILE, resume_step)
        self._samples = _open_trimmed(self._dir / SAMPLES_FILE, resume_step)
        self._evaluated = {
            row["step"] for row in read_rows(self._dir / METRICS_FILE) if EVALUATED in row
        }
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and only this process needs it

            purge = 0 if resume_step is None else resume_step + 1
            self._events = SummaryWriter(
                str(self._dir / TENSORBOARD_DIR),
                purge_step=purge,
                filename_suffix=f".{time.time_ns()}",  # its own names repeat within a second
            )

    def evaluated(self, step: int) -> bool:
        """Whether the file already had an evaluation of this step when it was opened. Collective.

        An evaluation that a signal interrupted is missing there, though its step was saved.
        """
        return distributed.broadcast(self._enabled and step in self._evaluated)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row. Values are numbers or arrays of one element (numpy or jax).

        Raises ValueError when a value is not one number, naming its key.
        """
        if not self._enabled:
            return
        values = {key: _as_number(key, value) for key, value in metrics.items()}
        row = {"step": int(step), "wall_time": round(time.time(), 3)} | values
        _append(self._metrics, {key: _finite_or_none(value) for key, value in row.items()})
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(key, value, int(step))
        if self._bucket is not None and self._bucket.due():
            self.flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Appends one text sample; TensorBoard shows it as preformatted text."""
        if not self._enabled:
            return
        _append(self._samples, {"step": int(step), "name": name, "text": text})
        if self._events is not None:
            indented = "\n".join("    " + line for line in text.splitlines())
            self._events.add_text(name, indented, int(step))

    def flush(self) -> None:
        """Pushes TensorBoard's events to disk (the JSON lines are there), and all to a bucket."""
        if not self._enabled:
            return
        if self._events is not None:
            self._events.flush()
        if self._bucket is not None:
            self._bucket.copy()

    def close(self) -> None:
        """Flushes and closes the files; writing afterwards is an error."""
        if not self._enabled:
            return
        self.flush()
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()
        if self._bucket is not None:
            self._bucket.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Bucket:
    """A local folder that stands for a remote one; starts with the remote JSON lines."""

    def __init__(self, url: str | os.PathLike):
        self._remote = epath.Path(url)
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="sdjax-metrics-"))
        self._sizes: dict[pathlib.Path, int] = {}
        self._copied = time.monotonic()
        for name in (METRICS_FILE, SAMPLES_FILE):
            if (self._remote / name).exists():
                (self.local / name).write_bytes((self._remote / name).read_bytes())

    def due(self) -> bool:
        """Whether the last copy is COPY_EVERY_S old."""
        return time.monotonic() - self._copied >= COPY_EVERY_S

    def copy(self) -> None:
        """Copies the files that have changed; the files only grow, so their size tells."""
        for path in (path for path in self.local.rglob("*") if path.is_file()):
            size = path.stat().st_size
            if self._sizes.get(path) != size:
                target = self._remote / path.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._sizes[path] = size
        self._copied = time.monotonic()

    def close(self) -> None:
        """Removes the local folder."""
        shutil.rmtree(self.local)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file in order, without a half-written last line; nulls become NaN.

    Raises ValueError when a line other than the last is not JSON.
    """
    rows = []
    lines = epath.Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the writer was killed in the middle
                continue
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The workdir's metrics by ascending step, one dict per step: rows of one step are merged."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        raise ValueError(f"{path} not found: is {workdir} the workdir of a run?")
    merged: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Reward, length, truncation and epistemic words of a batch, over all processes' rollouts.

    `reward/group_solved_frac` is the fraction of groups with a correct response,
    `reward/group_mixed_frac` that of groups with both kinds, the only ones GRPO learns from.
    Every process must call it. Raises ValueError on an empty batch.
    """
    rows = [row for part in distributed.allgather_objects(_measure(rollouts)) for row in part]
    if not rows:
        raise ValueError("no rollouts to measure: the batch is empty")
    groups, rewards, lengths, truncated, bounded, *words = np.array(rows, np.float64).T
    totals = np.sum(words, axis=0)
    solved = np.array([rewards[groups == g].max() > 0 for g in np.unique(groups)])
    failed = np.array([rewards[groups == g].min() <= 0 for g in np.unique(groups)])
    out = {
        "reward/mean": rewards.mean(),
        "reward/group_solved_frac": solved.mean(),
        "reward/group_mixed_frac": (solved & failed).mean(),
        "rollout/response_len_mean": lengths.mean(),
        "rollout/response_len_p95": np.percentile(lengths, 95),
        "rollout/response_len_max": lengths.max(),
        "rollout/truncated_frac": truncated.mean(),
        "epistemic/per_response": totals.mean(),
        "epistemic/per_1k_tokens": epistemic.per_1000_tokens(totals.sum(), lengths.sum()),
        "epistemic/bounded_per_response": bounded.mean(),
    }
    for word, counts in zip(epistemic.WORDS, words, strict=True):
        out[f"epistemic/{word}"] = counts.mean()
    return {name: float(value) for name, value in out.items()}


def _measure(rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
    """Group, reward, length, truncation, whole words and each word's count of each rollout."""
    rows = []
    for rollout in rollouts:
        counts = epistemic.count(rollout.text)
        rows.append(
            (
                rollout.group,
                rollout.verdict.reward,
                len(rollout.response_tokens),
                rollout.truncated,
                epistemic.total(epistemic.count_bounded(rollout.text)),
                *(counts[word] for word in epistemic.WORDS),
            )
        )
    return rows


def _open_trimmed(path: pathlib.Path, resume_step: int | None):
    """Opens a JSON-lines file for appending after dropping the rows of steps > resume_step."""
    if path.exists():
        kept = [] if resume_step is None else _rows_up_to(path, resume_step)
        temporary = path.with_suffix(".trimmed")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)  # a kill here leaves either the old file or the new one
    return open(path, "a", encoding="utf-8")


def _rows_up_to(path: pathlib.Path, step: int) -> Iterable[str]:
    """The file's lines of steps <= `step`, as they were written."""
    rows = read_rows(path)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [line for line, row in zip(lines, rows, strict=False) if row["step"] <= step]


def _append(file, row: Mapping[str, Any]) -> None:
    """One line, in the hands of the operating system when this returns (survives SIGKILL)."""
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _as_number(key: str, value: Any) -> int | float:
    """A Python number of a scalar of any library; integers stay integers."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise ValueError(f"metric {key} must be one number, got {array.dtype} {array.shape}")
    return int(array.item()) if array.dtype.kind in "biu" else float(array.item())


def _finite_or_none(value: int | float) -> int | float | None:
    return value if math.isfinite(value) else None


def _is_process_zero() -> bool:
    import jax  # here, so that reading metrics back does not start a backend

    return jax.process_index() == 0
