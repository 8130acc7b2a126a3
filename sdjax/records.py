"""Host-side records that travel between the stages: problems, rollouts, verdicts, contexts.

Plain frozen dataclasses without jax, so that verifier workers can import them cheaply. Arrays of a
mini-batch live in `sdjax.types`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

FINISH_EOS = "eos"
FINISH_LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class Problem:
    """One checkable problem.

    `prompt` is the text of the user's turn; `answer` the gold that the verifier compares with;
    `solution` an optional worked solution and `feedback` an optional fixed hint (both privileged);
    `meta` whatever the source knows besides (family, level, tests of a code problem ...).
    """

    id: str
    prompt: str
    answer: str
    solution: str | None = None
    feedback: str | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier says of one response; `reason` is a short machine-readable word."""

    correct: bool
    extracted: str | None
    reason: str
    feedback: str | None = None

    @property
    def reward(self) -> float:
        """1.0 for a correct response, else 0.0."""
        return float(self.correct)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. top_k 0, top_p 1 and min_p 0 switch the truncation off.

    `temperature` 0 is greedy. `seed` and the request's id fix the tokens, whatever slot, batch or
    mesh they were sampled in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks for `n` responses to one prompt, which share one prefill.

    `forced_prefix` are response tokens that are written first instead of sampled (an opened think
    tag, the beginning of a solution); they count as response tokens and are scored like them.
    """

    id: int
    prompt_tokens: tuple[int, ...]
    n: int
    sampling: SamplingParams
    forced_prefix: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response: tokens [R] int32 with the end token, log-probabilities [R] float32.

    `sampler_logp` is taken after temperature and before truncation, `truncated_logp` after it (see
    METHODS 1.5: importance ratios need to know which). `finish_reason` is "eos" or "length".
    """

    request_id: int
    index: int
    tokens: np.ndarray
    sampler_logp: np.ndarray
    truncated_logp: np.ndarray
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A response with all the trainer needs to know of it; `group` is its problem's index."""

    problem: Problem
    group: int
    index: int
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    sampler_logp: np.ndarray
    finish_reason: str
    text: str
    verdict: Verdict

    @property
    def truncated(self) -> bool:
        """Whether the response hit the length limit instead of ending by itself."""
        return self.finish_reason == FINISH_LENGTH


@dataclasses.dataclass(frozen=True)
class TeacherContext:
    """What the teacher sees for one rollout; `prompt_tokens` is None without a privileged view.

    `kind` names the branch taken (demonstration, solution, feedback, instruction, none) and
    `text` is the rendered prompt before tokenisation, kept for the log.
    """

    prompt_tokens: np.ndarray | None
    kind: str
    text: str = ""
    truncated: bool = False

    @property
    def has_teacher(self) -> bool:
        """Whether the rollout is distilled at all (d_i of METHODS section 0)."""
        return self.prompt_tokens is not None
