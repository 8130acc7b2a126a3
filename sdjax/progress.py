"""One line that says where a run is and when it ends.

In a terminal the line is rewritten in place; in a log file it becomes plain lines without carriage
returns, at most one every few seconds. Goes to standard error, process 0 only. Keeps no files.
"""

from __future__ import annotations

import collections
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

FIELDS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("rollout/response_len_mean", "len", "{:.0f}"),
    ("epistemic/per_response", "epistemic", "{:.2f}"),
    ("loss/total", "loss", "{:.4g}"),
)
WINDOW = 50  # steps that the estimate of the remaining time averages over


class Progress:
    """Shows `step 12/100 ...` with the time left.

    `start` is the step that a continued run begins after. `fields` are (metric key, label, format);
    a metric that a step does not report is left out. The first step is not used for the estimate
    when there are others, because it compiles.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        label: str = "step",
        fields: tuple[tuple[str, str, str], ...] = FIELDS,
        stream: TextIO | None = None,
        log_every_s: float = 5.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._label, self._fields = total, label, fields
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._clock, self._log_every_s = enabled, clock, log_every_s
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._marks = collections.deque([(start, clock())], maxlen=WINDOW + 1)
        self._first = start
        self._last_printed = -math.inf
        self._drawn = False

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` is done."""
        if not self._enabled:
            return
        now = self._clock()
        self._marks.append((step, now))
        line = self._line(step, metrics)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + line[:width])
            self._drawn = True
        elif step in (self._first + 1, self._total) or self._due(now):
            self._stream.write(line + "\n")
            self._last_printed = now
        self._stream.flush()

    def note(self, text: str) -> None:
        """Prints a line of its own above the display."""
        if not self._enabled:
            return
        self._end_line()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last line standing."""
        self._end_line()
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def eta_s(self) -> float:
        """Estimated seconds to the last step; NaN before the first step is done."""
        marks = list(self._marks)
        if len(marks) > 2 and marks[0][0] == self._first:
            marks = marks[1:]  # without the step that compiled
        (step_a, time_a), (step_b, time_b) = marks[0], marks[-1]
        if step_b == step_a:
            return math.nan
        return (time_b - time_a) / (step_b - step_a) * max(0, self._total - step_b)

    def _line(self, step: int, metrics: Mapping[str, Any]) -> str:
        parts = [f"{self._label} {step:>{len(str(self._total))}}/{self._total}"]
        for key, name, form in self._fields:
            if key in metrics:
                parts.append(f"{name} {form.format(float(metrics[key]))}")
        seconds = self._seconds_per_step()
        if math.isfinite(seconds):
            parts.append(f"{seconds:.1f} s/{self._label}")
        parts.append(f"ETA {format_seconds(self.eta_s())}")
        return "  ".join(parts)

    def _seconds_per_step(self) -> float:
        (step_a, time_a), (step_b, time_b) = list(self._marks)[-2:]
        return (time_b - time_a) / (step_b - step_a) if step_b > step_a else math.nan

    def _due(self, now: float) -> bool:
        return now - self._last_printed >= self._log_every_s

    def _end_line(self) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._drawn = False


def format_seconds(seconds: float) -> str:
    """59 -> "59s", 3600 -> "1h 00m", NaN -> "?"."""
    if not math.isfinite(seconds):
        return "?"
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
