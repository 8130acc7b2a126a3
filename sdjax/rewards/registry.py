"""Rewards by name: what is cut from a response in the trainer, and what judges it elsewhere.

A reward is two functions. `extract(response, gold, config)` runs in the trainer process and must be
cheap: it returns a final `Verdict`, or the text that remains to be judged. `judge(answer, gold,
config)` runs in a worker process that may be killed. Names are resolved lazily, so that importing
this package costs nothing; a user's own reward is a dotted path `package.module:function`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

from sdjax.records import Verdict
from sdjax.rewards.options import RewardConfig

Extract = Callable[[str, str, RewardConfig], "Verdict | str"]
Judge = Callable[[str, str, RewardConfig], Verdict]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A named reward; `inline` says that `judge` is cheap and safe enough for the trainer."""

    name: str
    extract: Extract
    judge: Judge
    inline: bool = False

    def __call__(self, response: str, gold: str, config: RewardConfig | None = None) -> Verdict:
        """Judge one response in this process, without the protection of a worker."""
        config = config or RewardConfig()
        found = self.extract(response, gold, config)
        return found if isinstance(found, Verdict) else self.judge(found, gold, config)


BUILT_IN = {
    "math": "sdjax.rewards.mathematics:MATH",
    "gold": "sdjax.rewards.gold:GOLD",
    "sdpo_released": "sdjax.rewards.released:SDPO_RELEASED",
    "choice": "sdjax.rewards.choice:CHOICE",
    "answer_line": "sdjax.rewards.lines:ANSWER_LINE",
    "format_boxed": "sdjax.rewards.formats:BOXED",
    "format_strict": "sdjax.rewards.formats:STRICT",
    "format_lenient": "sdjax.rewards.formats:LENIENT",
    "tool": "sdjax.rewards.tool:TOOL",
    "code": "sdjax.rewards.code:CODE",
}


def names() -> list[str]:
    """Names of the built-in rewards."""
    return sorted(BUILT_IN)


def get_reward(name: str) -> Reward:
    """The reward called `name`: a built-in one, or `package.module:function`.

    A user's function takes (response, gold) or (response, gold, config) and returns a Verdict, a
    bool or a float. Raises ValueError in one sentence where the name leads nowhere.
    """
    path = BUILT_IN.get(name, name)
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise ValueError(
            f"reward.name={name!r} is unknown: use one of {', '.join(names())}, "
            "or 'package.module:function' for your own."
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward.name={name!r} cannot be loaded ({error}): put the module on PYTHONPATH and "
            "check the function's name."
        ) from error
    return found if isinstance(found, Reward) else from_function(name, found)


def from_function(name: str, function: Callable) -> Reward:
    """Wraps a user's function(response, gold[, config]) as a Reward that runs in the workers."""
    takes_config = function.__code__.co_argcount >= 3 if hasattr(function, "__code__") else False

    def judge(response: str, gold: str, config: RewardConfig) -> Verdict:
        found = function(response, gold, config) if takes_config else function(response, gold)
        if isinstance(found, Verdict):
            return found
        return Verdict(correct=bool(found), extracted=None, reason="custom")

    return Reward(name=name, extract=lambda response, gold, config: response, judge=judge)
