r"""The default reward: is the content of the last \boxed{...} equal to the gold?"""

from __future__ import annotations

from sdjax.records import Verdict
from sdjax.rewards.extract import boxed_answer, missing
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.quick import quick_equal, squeeze
from sdjax.rewards.registry import Reward


def unboxed_gold(gold: str) -> str:
    r"""The gold without a \boxed{} of its own."""
    if "\\boxed" not in gold:
        return gold
    return boxed_answer(gold)[0] or gold


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """A verdict where text or plain numbers decide, else the box for a worker."""
    gold = unboxed_gold(gold or "")
    if not gold.strip():
        return missing("empty_gold")
    answer, reason = boxed_answer(response, config)
    if answer is None:
        return missing(reason)
    if len(answer) > config.max_answer_chars + len(gold):
        return Verdict(squeeze(answer) == squeeze(gold), answer[:100], "too_long")
    decided = quick_equal(answer, gold)
    if decided is None:
        return answer
    return Verdict(decided, answer, "equal" if decided else "different")


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Mathematical equality of a box and the gold."""
    return Verdict(False, answer, "different")


MATH = Reward(name="math", extract=extract, judge=judge)
