r"""The reward that SDPO released (`verl/utils/reward_score/feedback/math.py`), surprises included.

It reads the last 100 characters only, takes the box verbatim, wants string equality with the gold,
and otherwise asks math-verify about the two *bare* strings, from which math-verify picks out plain
numbers: `204\pi` passes for `204`. Kept under its own name so that its effect can be studied.
"""

from __future__ import annotations

from sdjax.records import Verdict
from sdjax.rewards.fallback import import_math_verify
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward

WINDOW = 100  # characters of the response that are looked at
FORMAT = (
    "Your answer had the wrong format. The solution must be given in the format: "
    "\\boxed{your_answer}."
)
TRUNCATED = "Your response was truncated because it exceeded the maximum length."
WRONG = "Your answer is incorrect. The correct answer is {gold}."


def last_box_verbatim(text: str) -> str:
    r"""Content of the last `\boxed{`, every brace counted, or "" when there is none or no end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0 and text[at] == "}":
            return text[start + len("\\boxed{") : at]
    return ""


def feedback_text(
    correct: bool, answer: str, gold: str, truncated: bool, correctness_feedback: bool
) -> str:
    """The feedback string; truncation is reported even for a correct answer."""
    if truncated:
        return TRUNCATED
    if not answer:
        return FORMAT
    if not correct and correctness_feedback:
        return WRONG.format(gold=gold)
    return ""


def _verdict(correct: bool, answer: str, gold: str, config: RewardConfig) -> Verdict:
    feedback = feedback_text(correct, answer, gold, config.truncated, config.correctness_feedback)
    reason = "equal" if correct else "different" if answer else "no_box"
    return Verdict(correct, answer, reason, feedback)


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """String equality of the box in the last 100 characters, else the box for a worker."""
    answer = last_box_verbatim((response or "")[-WINDOW:])
    if answer == gold or not answer or not config.fallback:
        return _verdict(answer == gold, answer, gold, config)
    return answer


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """math-verify on the bare strings; an exception counts as wrong, as in the original."""
    math_verify = import_math_verify()
    try:
        sides = [math_verify.parse(text, parsing_timeout=None) for text in (gold, answer)]
        correct = math_verify.verify(*sides, timeout_seconds=None)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        correct = False
    return _verdict(correct, answer, gold, config)


SDPO_RELEASED = Reward(name="sdpo_released", extract=extract, judge=judge)
