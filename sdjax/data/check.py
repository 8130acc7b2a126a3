"""mode = "check_rewards": how a data set's golds parse, which fail, and what overlaps.

Loads the set as training would, verifies every gold against itself, compares the questions with
the sets named in config.eval.sets, prints the account and writes it as JSON into the workdir.
"""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from sdjax.data import chat
from sdjax.data.benchmarks import SOURCES, source_of_path
from sdjax.data.golds import GoldCheck, check_golds, kinds
from sdjax.data.overlap import Overlap, find_overlap
from sdjax.data.problems import GENERIC, DataConfig, LoadReport, load_report, load_set
from sdjax.rewards import RewardConfig, VerifierPool

SHOWN = 20  # failing golds printed; the JSON file has all of them


def run(c: ConfigDict, workdir: str) -> None:
    """Prints and writes the report; leaves with status 1 when a gold fails or a row is bad."""
    cfg, reward = chosen(c)
    tokenizer = None if cfg.name == "synthetic" else _tokenizer(c)
    report = load_report(cfg, tokenizer)
    with VerifierPool(
        workers=c.reward.workers,
        reward=reward,
        config=RewardConfig.from_config(c),
    ) as pool:
        checks = check_golds(report.problems, pool, reward)
    overlaps = {
        name: find_overlap(report.problems, load_set(name, c), c.data.overlap_ngram)
        for name in c.eval.sets
        if name != cfg.name
    }
    summary = as_json(report, checks, overlaps, reward)
    target = Path(workdir) / "check_rewards.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    print(as_text(summary))
    print(f"written to {target}")
    if summary["passed"] < summary["problems"] or summary["bad_rows"]:
        raise SystemExit(1)


def chosen(c: ConfigDict) -> tuple[DataConfig, str]:
    """The data config with a known source recognised by its file name, and the reward's name."""
    section = c.data.copy_and_resolve_references()
    known = source_of_path(c.data.path) if c.data.name in GENERIC else None
    if known is not None:
        section.name, split = known
        section.split = section.split or split
    cfg = DataConfig.from_config(section)
    if c.reward.name != "auto":
        return cfg, c.reward.name
    return cfg, SOURCES[cfg.name].reward if cfg.name in SOURCES else "math"


def as_json(
    report: LoadReport, checks: list[GoldCheck], overlaps: dict[str, Overlap], reward: str
) -> dict:
    """The whole account as plain values."""
    return {
        "origin": report.origin,
        "reward": reward,
        "rows": report.rows,
        "duplicates": report.duplicates,
        "too_long": report.too_long,
        "problems": len(checks),
        "passed": sum(c.passed for c in checks),
        "kinds": kinds(checks),
        "bad_rows": [{"row": b.index, "reason": b.reason} for b in report.bad_rows],
        "failing": [_entry(c) for c in checks if not c.passed],
        "overlap": {
            name: {"exact": len(o.exact), "near": len(o.near), "pairs": _pairs(report, o)}
            for name, o in overlaps.items()
        },
    }


def as_text(summary: dict) -> str:
    """The account for the terminal."""
    lines = [
        f"{summary['origin']}  (reward {summary['reward']})",
        f"  rows {summary['rows']}, bad {len(summary['bad_rows'])}, duplicates "
        f"{summary['duplicates']}, too long {summary['too_long']}, problems {summary['problems']}",
        f"  golds read and verified against themselves: {summary['passed']} of "
        f"{summary['problems']} ({summary['passed'] / summary['problems']:.1%}): "
        + ", ".join(f"{kind} {count}" for kind, count in summary["kinds"].items()),
    ]
    for name, found in summary["overlap"].items():
        lines.append(f"  overlap with {name}: {found['exact']} exact, {found['near']} near")
    for bad in summary["bad_rows"][:SHOWN]:
        lines.append(f"  bad row {bad['row']}: {bad['reason']}")
    for entry in summary["failing"][:SHOWN]:
        lines.append(
            f"  failing: row {entry['row']} id {entry['id']}: {entry['gold'][:80]!r} "
            f"({entry['reason']})"
        )
    if len(summary["failing"]) > SHOWN:
        lines.append(f"  ... and {len(summary['failing']) - SHOWN} more failing golds")
    return "\n".join(lines)


def _entry(check: GoldCheck) -> dict:
    problem = check.problem
    return {
        "row": problem.meta.get("row"),
        "id": problem.id,
        "gold": problem.answer,
        "reason": check.kind,
    }


def _pairs(report: LoadReport, overlap: Overlap) -> list[dict]:
    return [
        {"row": report.problems[i].meta.get("row"), "held_out_id": other, "kind": kind}
        for kind, found in (("exact", overlap.exact), ("near", overlap.near))
        for i, other in sorted(found.items())
    ]


def _tokenizer(c: ConfigDict):
    """The model's tokenizer for the length filter, None when config.model.path is empty."""
    return chat.load_tokenizer(c.model.path) if c.model.path else None
