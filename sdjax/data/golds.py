r"""Are the golds fit to be rewarded? Each is shown to its own verifier, once, when data is loaded.

A gold passes when a response that gives exactly it is judged correct and, for mathematics, when it
can be read: as a number, an expression, or words. An unreadable or undefined gold (`\frac{1}{0}`)
would only ever match by its very characters, so it fails.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence

from sdjax.records import Problem
from sdjax.rewards import VerifierPool
from sdjax.rewards.code import read_tests

SHOWN = 5  # failing golds named in a warning
log = logging.getLogger(__name__)
MATH_REWARDS = ("math", "sdpo_released", "answer_line")


@dataclasses.dataclass(frozen=True)
class GoldCheck:
    """What the verifier says of one gold. `kind` is what it was read as, or why it fails."""

    problem: Problem
    passed: bool
    kind: str


def as_response(gold: str, reward: str) -> str | None:
    """A response that gives `gold` in the form that `reward` reads; None where none can be made.

    Code golds are tests: no response passes them without solving the problem.
    """
    if reward == "choice":
        return f"<answer>\n{gold}\n</answer>"
    if reward == "answer_line":
        return f"Answer: {gold}"
    if reward == "tool":
        calls = json.loads(gold)
        calls = calls if isinstance(calls, list) else [calls]
        lines = [
            f"Action: {c['Action']}\nAction Input: {c.get('Action_Input', '{}')}" for c in calls
        ]
        return "\n".join(lines)
    if reward == "code":
        return None
    return f"\\boxed{{{gold}}}"


def check_golds(problems: Sequence[Problem], pool: VerifierPool, reward: str) -> list[GoldCheck]:
    """One GoldCheck per problem, in order; `pool` is one of `reward`.

    How a user's own reward wants an answer written is not known here, and the format rewards read
    no gold: these golds pass as "unchecked".
    """
    if reward == "code":
        return [_tests_present(problem) for problem in problems]
    if reward not in (*MATH_REWARDS, "choice", "tool"):
        return [GoldCheck(problem, True, "unchecked") for problem in problems]
    golds = [problem.answer for problem in problems]
    itself = pool.score([as_response(gold, reward) for gold in golds], golds)
    read = _read_all(golds) if reward in MATH_REWARDS else itself
    return [
        GoldCheck(p, a.correct and b.correct, b.reason if a.correct else a.reason)
        for p, a, b in zip(problems, itself, read, strict=True)
    ]


def warn_about_golds(
    sets: Mapping[str, Sequence[Problem]], pool: VerifierPool, reward: str
) -> None:
    """Log the golds of evaluation sets that fail; they stay, or scores would not compare."""
    for name, problems in sets.items():
        bad = [check for check in check_golds(problems, pool, reward) if not check.passed]
        if bad:
            shown = ", ".join(
                f"row {c.problem.meta.get('row')} ({c.problem.answer[:40]!r}: {c.kind})"
                for c in bad[:SHOWN]
            )
            log.warning(
                "%d of %d golds of evaluation set %s fail their verifier: %s",
                len(bad),
                len(problems),
                name,
                shown,
            )


def kinds(checks: Sequence[GoldCheck]) -> dict[str, int]:
    """How many golds are of each kind, or fail for each reason."""
    return dict(collections.Counter(c.kind for c in checks).most_common())


def _read_all(golds: Sequence[str]) -> list:
    """What mathematics makes of each gold; plain numbers need no worker process."""
    reader = VerifierPool(workers=1, reward="gold")
    try:
        return reader.score(list(golds), list(golds))
    finally:
        reader.close()


def _tests_present(problem: Problem) -> GoldCheck:
    try:
        read_tests(problem.answer)
    except (ValueError, KeyError, TypeError, AttributeError):
        return GoldCheck(problem, False, "unreadable_gold")
    return GoldCheck(problem, True, "tests")
