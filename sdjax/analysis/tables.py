"""Markdown tables of measured numbers. Reads no files and computes no metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

MISSING = "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned left and the others right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under {len(header)} headings: {row}")
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    pad = lambda row: [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [pad(cells[0]), rule, *(pad(row) for row in cells[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """A fixed-point number; a dash when there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}"


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± standard deviation` over seeds (n - 1); the mean alone for one value."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return MISSING
    mean = number(float(np.mean(finite)), digits)
    return f"{mean} ± {number(float(np.std(finite, ddof=1)), digits)}" if len(finite) > 1 else mean


def evaluation(metrics: Mapping[str, float]) -> str:
    """The table of one evaluation: a row per set, from its flat `eval/<set>/<name>` metrics."""
    by_set: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        area, _, rest = key.partition("/")
        name, _, metric = rest.partition("/")
        if area == "eval" and metric:
            by_set.setdefault(name, {})[metric] = value
    scores = list(dict.fromkeys(m for row in by_set.values() for m in row if m.startswith("avg@")))
    passes = list(dict.fromkeys(m for row in by_set.values() for m in row if m.startswith("pass@")))
    columns = [("response_len_mean", "tokens", 1), ("truncated_frac", "truncated", 3)]
    columns += [("epistemic_per_response", "epistemic words", 2)]
    columns += [("epistemic_per_1k_tokens", "per 1000 tokens", 2)]
    header = ["set", *scores, "± (se)", *passes, *(title for _, title, _ in columns)]
    rows = [
        [
            name,
            *(number(row.get(metric)) for metric in scores),
            number(row.get("stderr")),
            *(number(row.get(metric)) for metric in passes),
            *(number(row.get(key), digits) for key, _, digits in columns),
        ]
        for name, row in by_set.items()
    ]
    return markdown(header, rows)
