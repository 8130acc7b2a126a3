"""Options of the rewards: one frozen record, picklable as plain JSON for the worker processes."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a reward may be told; the defaults follow docs/verifier.md.

    `deadline_s` and `memory_mb` bound one worker; the `max_*` bounds are checked before anything is
    built from model text, so they decide verdicts independently of the machine.
    """

    deadline_s: float = 2.0  # seconds of work on one answer before its worker is killed
    memory_mb: int = 1024  # address space of one worker, MiB
    max_answer_chars: int = 1000  # longer boxes are wrong unless they repeat the gold exactly
    box_in_unclosed_think: bool = False  # count a box inside a <think> that never closes
    fallback: bool = True  # let math-verify judge what our own reader cannot read
    truncated: bool = False  # sdpo_released: the response ended without an end token
    correctness_feedback: bool = False  # name the right answer in the feedback of a wrong one
    case_sensitive: bool = False  # answer_line: letter case of the answer counts
    tests_per_problem: int | None = None  # code: run only the first so many tests
    test_seconds: float = 6.0  # code: CPU and wall seconds of one test
    test_memory_mb: int = 512  # code: address space of the sandbox, MiB
    feedback_chars: int = 800  # code: longest piece of a failing case quoted in the feedback

    def to_json(self) -> str:
        """The record as JSON, for the command line of a worker."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_config(cls, c) -> RewardConfig:
        """The options that `config.reward` sets."""
        r = c.reward
        return cls(
            deadline_s=r.deadline_s,
            memory_mb=r.memory_mb,
            max_answer_chars=r.max_answer_chars,
            box_in_unclosed_think=r.box_in_unclosed_think,
            fallback=r.fallback,
        )

    @classmethod
    def from_json(cls, text: str) -> RewardConfig:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


DEFAULT = RewardConfig()
