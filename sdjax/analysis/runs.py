"""A finished or running workdir, as the reports read it: config.json and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

import numpy as np
from etils import epath

from sdjax.metrics import read_metrics

_SCORE = re.compile(r"eval/(?P<set>.+)/avg@(?P<samples>\d+)$")
LENGTH_LABEL = "response length (tokens)"
WORD_LABEL = "epistemic words per response"
RATE_LABEL = "epistemic words per 1000 tokens"

# Columns of an evaluation set in the tables: metric name, heading, digits.
COLUMNS = (
    ("response_len_mean", LENGTH_LABEL, 1),
    ("epistemic_per_response", WORD_LABEL, 2),
    ("epistemic_per_1k_tokens", RATE_LABEL, 2),
    ("truncated_frac", "truncated fraction", 3),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's config and metrics (one dict per step) and its sets: name -> score's key."""

    workdir: epath.Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: dict[str, str]

    @classmethod
    def read(cls, workdir: str | os.PathLike) -> Run:
        """Raises ValueError when there are no metrics."""
        workdir = epath.Path(workdir)
        rows = read_metrics(workdir)
        path = workdir / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        scores = {}
        for row in rows:
            for match in filter(None, map(_SCORE.match, row)):
                scores.setdefault(match["set"], match[0])
        order = [name for name in config.get("eval", {}).get("sets", ()) if name in scores]
        return cls(workdir, config, rows, {name: scores[name] for name in order} | scores)

    @property
    def method(self) -> str:
        """GRPO, SDPO or both, from the weights of the two losses; else the workdir's name."""
        objective = self.config.get("objective", {})
        grpo, sdpo = objective.get("pg_coef", 0) > 0, objective.get("distill_coef", 0) > 0
        return {
            (True, False): "GRPO",
            (False, True): "SDPO",
            (True, True): "GRPO + SDPO",
        }.get((grpo, sdpo), self.workdir.name)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with an evaluation of the first set."""
        return [row for row in self.rows if next(iter(self.scores.values()), None) in row]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, where it was measured."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, int), np.array(values, float)
