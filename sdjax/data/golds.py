r"""Are the golds fit to be rewarded? Each is shown to its own verifier, once, when data is loaded.

A gold passes when a response that gives exactly it is judged correct. For mathematics a second,
dressed-up response tells whether the gold is also understood, or would only ever match by its very
characters ("text only"): such a gold rewards nobody who writes the same number differently.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence

from sdjax.records import Problem
from sdjax.rewards import VerifierPool
from sdjax.rewards.code import read_tests

MATH_REWARDS = ("math", "sdpo_released")


@dataclasses.dataclass(frozen=True)
class GoldCheck:
    """What the verifier says of one gold: as itself, and (mathematics) the same in other dress."""

    problem: Problem
    verified: bool
    understood: bool
    reason: str


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
    """One GoldCheck per problem, in order."""
    if reward == "code":
        return [_tests_present(problem) for problem in problems]
    responses = [as_response(problem.answer, reward) for problem in problems]
    golds = [problem.answer for problem in problems]
    verdicts = pool.score(responses, golds)
    dressed = verdicts
    if reward in MATH_REWARDS:
        dressed = pool.score([f"\\boxed{{\\displaystyle {gold}}}" for gold in golds], golds)
    return [
        GoldCheck(problem, plain.correct, other.correct, plain.reason)
        for problem, plain, other in zip(problems, verdicts, dressed, strict=True)
    ]


def reasons(checks: Sequence[GoldCheck]) -> dict[str, int]:
    """How often each reason was given for the golds that fail."""
    return dict(collections.Counter(c.reason for c in checks if not c.verified))


def _tests_present(problem: Problem) -> GoldCheck:
    try:
        read_tests(problem.answer)
    except (ValueError, KeyError, TypeError, AttributeError):
        return GoldCheck(problem, False, False, "unreadable_gold")
    return GoldCheck(problem, True, True, "tests")
