"""Checks a gold answer before anything is trained on it: can it be read, does it equal itself?"""

from __future__ import annotations

from sdjax.records import Verdict
from sdjax.rewards.extract import missing
from sdjax.rewards.mathematics import read_answer, unboxed_gold
from sdjax.rewards.nodes import TooBig
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.quick import plain_value, squeeze
from sdjax.rewards.registry import Reward


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """Empty golds and plain numbers are settled at once."""
    gold = unboxed_gold(gold or "").strip()
    if not gold:
        return missing("empty_gold")
    if plain_value(squeeze(gold)) is not None:
        return Verdict(True, gold, "number")
    return gold


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Reads the gold and compares it with itself, without the shortcut for equal texts."""
    from sdjax.rewards import equality, words

    if words.gold_letter(answer):
        return Verdict(True, answer, "words")
    try:
        node = read_answer(answer)
        if node.op == "words":
            return Verdict(True, answer, "words")
        same = equality.same_answer(node, node)
    except TooBig:
        return Verdict(False, answer, "too_big")
    except (ValueError, RecursionError):
        return Verdict(False, answer, "unreadable")
    return Verdict(same is True, answer, "expression" if same else "undefined")


GOLD = Reward(name="gold", extract=extract, judge=judge)
