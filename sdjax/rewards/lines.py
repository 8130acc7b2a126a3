"""`Answer:` lines, as the original DAPO prompt asks for, judged like a box."""

from __future__ import annotations

from sdjax.records import Verdict
from sdjax.rewards.extract import answer_line, missing
from sdjax.rewards.mathematics import decide_directly, judge
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """The rest of the last line that begins with `Answer:`."""
    line = answer_line(response or "")
    if line is None:
        return missing("no_answer_line")
    if not line:
        return missing("empty_answer_line")
    return decide_directly(line, gold, config)


ANSWER_LINE = Reward(name="answer_line", extract=extract, judge=judge)
