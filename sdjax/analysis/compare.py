"""Several runs side by side: mean and spread over seeds, per method.

Judges nothing and tests no significance: it prints what was measured. One run alone is `report`'s.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sdjax.analysis import figures, tables
from sdjax.analysis.figures import Curve, Panel
from sdjax.analysis.runs import COLUMNS, LENGTH_LABEL, WORD_LABEL, Run


def compare(
    workdirs: Sequence[str | os.PathLike] | Mapping[str, Sequence[str | os.PathLike]],
    out: str | os.PathLike,
) -> epath.Path:
    """Writes compare.md with mean and spread over seeds, and compare.png; returns the table's path.

    A mapping names the methods; a plain sequence is grouped by what the configs say apart from the
    seed. Raises ValueError when the runs share no evaluation set.
    """
    if not workdirs:
        raise ValueError("no runs to compare: name their workdirs in config.analysis.workdirs")
    groups = _groups(workdirs)
    shared = set.intersection(*(set(run.scores) for runs in groups.values() for run in runs))
    first = next(iter(groups.values()))[0]
    names = [name for name in first.scores if name in shared]
    if not names:
        raise ValueError(f"the runs {', '.join(map(str, workdirs))} share no evaluation set")
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Comparison\n", _seeds_line(groups)]
    for name in names:
        parts += [f"## `{name}`\n", _comparison_table(groups, name)]
    figures.save(_comparison_panels(groups, names), out / "compare.png")
    parts.append("![score, length and epistemic words against steps](compare.png)\n")
    path = out / "compare.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _groups(workdirs: Sequence | Mapping) -> dict[str, list[Run]]:
    """Runs by label: the method and, within it, the config fields in which its runs differ."""
    if isinstance(workdirs, Mapping):
        return {label: [Run.read(path) for path in paths] for label, paths in workdirs.items()}
    by_method: dict[str, list[Run]] = {}
    for path in workdirs:
        run = Run.read(path)
        by_method.setdefault(run.method, []).append(run)
    groups: dict[str, list[Run]] = {}
    for method, runs in by_method.items():
        configs = [_flatten(run.config) for run in runs]
        keys = {key for config in configs for key in config} - {"seed"}
        values = {key: {json.dumps(config.get(key)) for config in configs} for key in keys}
        differing = sorted(key for key in keys if len(values[key]) > 1)
        for run, config in zip(runs, configs, strict=True):
            label = ", ".join([method, *(f"{key}={config.get(key)}" for key in differing)])
            groups.setdefault(label, []).append(run)
    return groups


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _seeds_line(groups: Mapping[str, list[Run]]) -> str:
    parts = []
    for label, runs in groups.items():
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        parts.append(f"{label}: {seeds}, {runs[0].evaluations[-1]['step']} steps")
    return "; ".join(parts) + ". Numbers are mean ± standard deviation over seeds.\n"


def _comparison_table(groups: Mapping[str, list[Run]], name: str) -> str:
    """Base, final and gained score, and what else the final evaluation measured."""
    score = next(iter(groups.values()))[0].scores[name].rsplit("/", 1)[1]
    header = ["method", f"{score} base", f"{score} final", "gain"]
    header += [title for _, title, _ in COLUMNS]
    base_cells, rows = None, []
    for label, runs in groups.items():
        key = runs[0].scores[name]
        start = [run.evaluations[0].get(key, math.nan) for run in runs]
        final = [run.evaluations[-1].get(key, math.nan) for run in runs]
        gain = [b - a for a, b in zip(start, final, strict=True)]
        cells = [tables.mean_and_spread(values) for values in (start, final, gain)]
        at = lambda index, column, runs=runs: [
            run.evaluations[index].get(f"eval/{name}/{column}", math.nan) for run in runs
        ]
        rows.append([label, *cells] + [tables.mean_and_spread(at(-1, c), d) for c, _, d in COLUMNS])
        if base_cells is None:
            base_cells = ["base model", cells[0], tables.MISSING, tables.MISSING]
            base_cells += [tables.mean_and_spread(at(0, c), d) for c, _, d in COLUMNS]
    return tables.markdown(header, [base_cells, *rows])


def _comparison_panels(groups: Mapping[str, list[Run]], names: Sequence[str]) -> list[Panel]:
    """Score on the first set, mean score on the others, length and words on the first."""

    def curves(keys_of: Callable[[Run], list[str]]) -> list[Curve]:
        out = []
        for label, runs in groups.items():
            steps, values = _aligned(runs, keys_of(runs[0]))
            out.append(Curve(label, steps, values))
        return out

    first, others = names[0], list(names[1:])
    panels = [
        Panel(f"Score, {first}", "fraction correct", curves(lambda r: [r.scores[first]]), True)
    ]
    if others:
        keys = lambda run: [run.scores[name] for name in others]
        outside = all(name.startswith("ood") for name in others)
        title = "Score, out of distribution" if outside else f"Score, {', '.join(others)}"
        panels.append(Panel(title, "fraction correct", curves(keys), True))
    length = lambda _: [f"eval/{first}/response_len_mean"]
    words = lambda _: [f"eval/{first}/epistemic_per_response"]
    panels.append(Panel(f"Length, {first}", LENGTH_LABEL, curves(length)))
    panels.append(Panel(f"Epistemic words, {first}", WORD_LABEL, curves(words)))
    return panels


def _aligned(runs: Sequence[Run], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [X] that all runs measured and values [N, X], the mean over `keys` of each run."""
    by_step = [
        {row["step"]: np.mean([row[key] for key in keys]) for row in run.rows if keys[0] in row}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(one) for one in by_step)))
    return np.array(steps), np.array([[one[step] for step in steps] for one in by_step])
