"""What happened in a run: report.md with tables and plots.

Reads metrics.jsonl and config.json of a finished or running workdir and nothing else, so a report
can be made anywhere and at any time:

    python -m sdjax.main --config.mode=analyze --workdir=runs/tiny

The best step is that of the first evaluation set. Several runs side by side are `compare`'s.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sdjax.analysis import figures, judge, tables, word_shift
from sdjax.analysis.compare import compare
from sdjax.analysis.epistemic import WORDS
from sdjax.analysis.figures import Curve, Panel
from sdjax.analysis.runs import COLUMNS, LENGTH_LABEL, RATE_LABEL, WORD_LABEL, Run
from sdjax.metrics import read_rows

LOG = logging.getLogger(__name__)

REPORT_FILE = "report.md"


def write_report(workdir: str | os.PathLike) -> epath.Path:
    """Writes report.md and its plots into the workdir; returns the report's path."""
    run = Run.read(workdir)
    parts = [f"# {run.method} run `{run.workdir.name}`\n", _facts(run)]
    if run.evaluations:
        parts += ["## Evaluation\n", _start_best_final(run)]
    if any("reward/mean" in row for row in run.rows):
        parts += ["## Training batches\n", _training_table(run)]
    if words := _divergence_by_word(run):
        parts += ["## Divergence from the teacher by epistemic word\n", words]
    for name, title, panels in _run_figures(run):
        figures.save(panels, run.workdir / name)
        parts.append(f"![{title}]({name})\n")
    path = run.workdir / REPORT_FILE
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _facts(run: Run) -> str:
    """One line on what ran and for how long."""
    facts = []
    config = run.config
    if config:
        facts.append(f"model `{config['model']['path']}`, seed {config['seed']}")
    facts.append(f"step {run.rows[-1]['step']}")
    if len(run.rows) > 1:
        minutes = (run.rows[-1]["wall_time"] - run.rows[0]["wall_time"]) / 60
        facts.append(f"{minutes:.1f} minutes between the first and the last row")
    memory = [row["memory/peak_gb"] for row in run.rows if "memory/peak_gb" in row]
    if memory:
        facts.append(f"peak memory {max(memory):.2f} GB")
    return "; ".join(facts) + ".\n"


def _start_best_final(run: Run) -> str:
    """Start, best and final evaluation; best has the highest score on the first set."""
    rows = run.evaluations
    score = next(iter(run.scores.values()))
    best = max(rows, key=lambda row: -math.inf if math.isnan(row[score]) else row[score])
    columns = (("start", rows[0]), ("best", best), ("final", rows[-1]))
    table = []
    for name, key in run.scores.items():
        metric = key.rsplit("/", 1)[1]
        passes = [k for k in rows[-1] if k.startswith(f"eval/{name}/pass@")]
        lines = [(key, f"score ({metric})", 3)]
        lines += [(k, k.rsplit("/", 1)[1], 3) for k in passes if not k.endswith("pass@1")]
        lines += [(f"eval/{name}/{column}", title, digits) for column, title, digits in COLUMNS]
        for k, title, digits in lines:
            values = [tables.number(row.get(k), digits) for _, row in columns]
            table.append([f"`{name}`", title, *values])
    header = ["set", "measured", *(f"{title} (step {row['step']})" for title, row in columns)]
    note = f"Best is the step with the highest score on `{next(iter(run.scores))}`."
    return tables.markdown(header, table, left=2) + "\n" + note + "\n"


TRAINING = (
    ("reward/mean", "reward", 3),
    ("reward/group_solved_frac", "groups with a correct response", 3),
    ("rollout/response_len_mean", LENGTH_LABEL, 1),
    ("rollout/truncated_frac", "truncated fraction", 3),
    ("epistemic/per_response", WORD_LABEL, 2),
    ("epistemic/per_1k_tokens", RATE_LABEL, 2),
    ("loss/total", "loss", 4),
    ("distill/divergence", "divergence from the teacher (nats per token)", 4),
    ("student/entropy", "entropy of the student (nats per token)", 3),
    ("teacher/entropy", "entropy of the teacher (nats per token)", 3),
    ("policy/kl_initial", "KL to the initial policy (nats per token)", 4),
    ("drift/prob_error", "sampler-trainer probability error (1 is none)", 4),
    ("optim/grad_norm", "gradient norm", 4),
    ("rollout/verified_while_sampling_frac", "responses verified while others were sampled", 3),
    ("rollout/tokens_per_s", "sampled tokens per second", 1),
    ("time/sample_s", "seconds to sample", 2),
    ("time/verify_wait_s", "seconds of waiting for verdicts after sampling", 2),
    ("time/step_s", "seconds to update", 2),
)


def _training_table(run: Run, window: int = 5) -> str:
    """Means over the first and last few steps of what the training batches measured."""
    rows = [row for row in run.rows if "reward/mean" in row]
    window = max(1, min(window, len(rows) // 2))
    table = []
    for key, title, digits in TRAINING:
        if not any(key in row for row in rows):
            continue
        means = [_mean([row.get(key) for row in part]) for part in (rows[:window], rows[-window:])]
        table.append([title, *(tables.number(value, digits) for value in means)])
    header = ["mean per step", f"first {window} steps", f"last {window} steps"]
    return tables.markdown(header, table)


def _divergence_by_word(run: Run) -> str:
    """Mean divergence on each word's tokens over all steps, relative to that of all tokens."""
    mean = _mean([row.get("distill/divergence") for row in run.rows])
    rows = []
    for word in WORDS:
        pairs = [
            (row[f"distill/divergence_word_{word}"], row[f"distill/tokens_word_{word}"])
            for row in run.rows
            if row.get(f"distill/tokens_word_{word}", 0) > 0
        ]
        if pairs:
            values, counts = np.array(pairs, float).T
            value = float(np.average(values, weights=counts))
            rows.append([word, str(int(counts.sum())), tables.number(value, 4)])
            rows[-1].append(f"{value / mean:.1f}x")
    header = ["word", "tokens", "divergence (nats)", "over the mean of all tokens"]
    return tables.markdown(header, rows) if rows else ""


def _run_figures(run: Run) -> list[tuple[str, str, list[Panel]]]:
    """(file, title, panels) of the two plots: score and length; epistemic words."""

    def curves(column: str, training: str) -> list[Curve]:
        keys = {
            name: score if column == "score" else f"eval/{name}/{column}"
            for name, score in run.scores.items()
        }
        out = [Curve(name, *run.series(key)) for name, key in keys.items()]
        steps, values = run.series(training)
        return out + [Curve("training batches", steps, values, faint=True)] * bool(len(steps))

    score = Panel("Score", "fraction correct", curves("score", "reward/mean"), unit_range=True)
    length = Panel("Length", LENGTH_LABEL, curves("response_len_mean", "rollout/response_len_mean"))
    words = Panel(
        "Epistemic words", WORD_LABEL, curves("epistemic_per_response", "epistemic/per_response")
    )
    rate = Panel(
        "Epistemic words per length",
        RATE_LABEL,
        curves("epistemic_per_1k_tokens", "epistemic/per_1k_tokens"),
    )
    return [
        ("score_length.png", "score and length against steps", [score, length]),
        ("epistemic.png", "epistemic words against steps", [words, rate]),
    ]


def _mean(values: Sequence[float | None]) -> float:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def run(c: ConfigDict, workdir: str) -> None:
    """mode='analyze': writes what config.analysis.kind names into the workdir and says where."""
    kinds = {"report": lambda: write_report(workdir), "compare": lambda: _compare(c, workdir)}
    kinds |= {"word_shift": lambda: _word_shift(c, workdir), "judge": lambda: _judge(c, workdir)}
    kinds |= {"token_kl": lambda: _token_kl(c, workdir)}
    LOG.info("wrote %s", kinds[c.analysis.kind]())


def _compare(c: ConfigDict, workdir: str) -> epath.Path:
    return compare(c.analysis.workdirs, workdir)


def _token_kl(c: ConfigDict, workdir: str) -> epath.Path:
    from sdjax.analysis import token_study  # the only kind that needs a model

    return token_study.run(c, workdir)


def _word_shift(c: ConfigDict, workdir: str) -> epath.Path:
    """word_shift.md: each file of config.analysis.responses against config.analysis.base."""
    base = _responses(c.analysis.base, "config.analysis.base")
    if not c.analysis.responses:
        raise ValueError("config.analysis.responses is empty: name the files to compare")
    models = {path: _responses(path, "config.analysis.responses") for path in c.analysis.responses}
    shifts = {
        path: word_shift.word_shift(base, texts, c.analysis.min_count)
        for path, texts in models.items()
    }
    return _write(workdir, "word_shift.md", word_shift.table(shifts))


def _judge(c: ConfigDict, workdir: str) -> epath.Path:
    """judge_prompts.jsonl, or judge.md once config.analysis.judge_replies names the replies."""
    if not c.analysis.judge_replies:
        texts = [
            t for p in c.analysis.responses for t in _responses(p, "config.analysis.responses")
        ]
        if not texts:
            raise ValueError("config.analysis.responses is empty: name the files to be judged")
        path = _write(workdir, "judge_prompts.jsonl", "")
        judge.write_prompts(texts, path)
        return path
    judgements, unreadable = judge.read_replies(c.analysis.judge_replies)
    counts = [judgement.count for judgement in judgements.values()]
    row = [str(len(counts)), tables.mean_and_spread(counts, 2), str(len(unreadable))]
    header = ["replies", "expressions of doubt per response", "unreadable replies"]
    return _write(workdir, "judge.md", tables.markdown(header, [row], left=0))


def _responses(path: str, field: str) -> list[str]:
    """The texts of a file of responses, as mode='evaluate' writes it."""
    if not path or not epath.Path(path).exists():
        raise ValueError(f"{field} is {path!r}, which is not a file of responses (JSON lines)")
    rows = read_rows(path)
    if not all("response" in row for row in rows):
        raise ValueError(f'{field}: {path} has a line without "response"')
    return [row["response"] for row in rows]


def _write(workdir: str, name: str, text: str) -> epath.Path:
    path = epath.Path(workdir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
