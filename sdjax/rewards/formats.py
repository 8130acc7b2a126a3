"""Format checks: rewards that look at the shape of a response only and ignore the gold."""

from __future__ import annotations

import re

from sdjax.records import Verdict
from sdjax.rewards.extract import boxed_answer
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward

_STRICT = re.compile(
    r"\s*<reasoning>\n(?:(?!</?reasoning>|</?answer>).)*?\n</reasoning>\n"
    r"<answer>\n(?:(?!</?reasoning>|</?answer>).)*?\n</answer>\s*",
    re.DOTALL,
)
MAX_CHARS = 400_000  # the patterns are linear, but nobody needs them on more


def _strict(response: str, gold: str, config: RewardConfig) -> Verdict:
    """<reasoning> and <answer>, each on lines of their own, once, and nothing else."""
    ok = len(response) <= MAX_CHARS and _STRICT.fullmatch(response) is not None
    return Verdict(ok, None, "format" if ok else "bad_format")


def _lenient(response: str, gold: str, config: RewardConfig) -> Verdict:
    """<reasoning>...</reasoning> somewhere before <answer>...</answer>."""
    marks = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    at = 0
    for mark in marks:
        at = response.find(mark, at)
        if at < 0:
            return Verdict(False, None, "bad_format")
        at += len(mark)
    return Verdict(True, None, "format")


def _boxed(response: str, gold: str, config: RewardConfig) -> Verdict:
    r"""A closed, filled \boxed{} outside unfinished reasoning."""
    answer, reason = boxed_answer(response, config)
    return Verdict(answer is not None, answer and answer[:100], reason)


def _inline(name: str, check) -> Reward:
    return Reward(
        name=name,
        extract=lambda response, gold, config: check(response or "", gold, config),
        judge=check,
        inline=True,
    )


STRICT = _inline("format_strict", _strict)
LENIENT = _inline("format_lenient", _lenient)
BOXED = _inline("format_boxed", _boxed)
