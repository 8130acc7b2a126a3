"""Multiple choice: the letter in <answer>...</answer> (SciKnowEval's format)."""

from __future__ import annotations

import re

from sdjax.records import Verdict
from sdjax.rewards.extract import missing, tagged
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward

_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
FORMAT = "Give only the letter of your choice, as <answer>letter</answer>."


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """The content of the last <answer> tag."""
    if not gold or not gold.strip():
        return missing("empty_gold")
    content = tagged(response or "", "answer")
    if content is None:
        return Verdict(False, None, "no_answer_tag", FORMAT)
    return content.strip()


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Right when it is exactly the gold's letter: restated options or two letters are wrong."""
    letter = _LETTER.fullmatch(answer)
    if letter is None:
        return Verdict(False, answer[:100], "no_letter", FORMAT)
    wanted = _LETTER.fullmatch(gold.strip())
    if wanted is None:
        return missing("gold_without_letter")
    correct = letter.group(1).upper() == wanted.group(1).upper()
    return Verdict(correct, letter.group(1).upper(), "equal" if correct else "different")


CHOICE = Reward(name="choice", extract=extract, judge=judge, inline=True)
