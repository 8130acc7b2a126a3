"""From problems to a mini-batch: sample, verify while sampling, find what the teacher sees.

The host's half of a training step (stages 1 to 5 of docs/design.md). Everything random follows from
(seed, step, the problem's place in the batch), so a resumed run samples the same responses on any
number of processes. Knows nothing of losses or optimizers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from sdjax.data import chat
from sdjax.data.packing import PackItem
from sdjax.data.prompts import problem_messages
from sdjax.records import (
    Completion,
    Problem,
    Request,
    Rollout,
    SamplingParams,
    TeacherContext,
    Verdict,
)

_SAMPLING_STREAM = 1  # keeps the sampler's seeds apart from others made of (seed, step)


def stream_seed(seed: int, step: int, stream: int) -> int:
    """A 31-bit seed that is a function of its arguments alone."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(1)[0] >> 1)


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How a problem becomes prompt tokens: the tokenizer and the template's switches."""

    tokenizer: Any
    enable_thinking: bool | None
    system: str | None
    chat_template: str | None

    def encode(self, problem: Problem) -> np.ndarray:
        """int32 tokens of the student's prompt, ending with the generation prompt."""
        return chat.encode_prompt(
            self.tokenizer,
            problem_messages(problem),
            enable_thinking=self.enable_thinking,
            system=self.system,
            chat_template=self.chat_template,
        )


def sample_and_verify(
    engine: Any,
    params: Any,
    pool: Any,
    style: PromptStyle,
    problems: Sequence[Problem],
    group_size: int,
    sampling: SamplingParams,
    *,
    seed: int,
    step: int,
    groups: Sequence[int] | None = None,
    on_tokens: Any = None,
) -> tuple[list[Rollout], dict[str, float]]:
    """Samples `group_size` responses to each problem and verifies each as soon as it is finished.

    Returns the rollouts ordered by group and index, and timings. `groups` are the places of the
    problems in the whole batch over all processes, ascending (None: from 0 on): what is sampled
    depends on them, not on the process. A problem whose prompt the engine dropped has no rollouts;
    one that it cut appears as it was cut, so that the trainer scores what was sampled.
    `on_tokens` is called after each decode chunk and may raise to give up.
    """
    groups = range(len(problems)) if groups is None else groups
    place = {group: i for i, group in enumerate(groups)}
    sampling = dataclasses.replace(sampling, seed=stream_seed(seed, step, _SAMPLING_STREAM))
    prompts = [style.encode(problem) for problem in problems]
    requests = [
        Request(group, tuple(map(int, prompt)), group_size, sampling)
        for group, prompt in zip(groups, prompts, strict=True)
    ]
    answers: dict[tuple[int, int], tuple[str, Future[Verdict]]] = {}

    def verify(done: Completion) -> None:
        text = chat.decode(style.tokenizer, done.tokens)
        gold = problems[place[done.request_id]].answer
        answers[done.request_id, done.index] = (text, pool.submit(text, gold))

    start = time.perf_counter()
    completions = engine.generate(params, requests, on_finish=verify, on_tokens=on_tokens)
    sampled = time.perf_counter()
    already = sum(future.done() for _, future in answers.values())
    places = {place[done.request_id] for done in completions}
    shown = {i: engine.cfg.fitted(prompts[i]) for i in places}
    rollouts = []
    for done in completions:
        text, future = answers[done.request_id, done.index]
        i = place[done.request_id]
        rollouts.append(
            Rollout(
                problem=problems[i],
                group=done.request_id,
                index=done.index,
                prompt_tokens=shown[i],
                response_tokens=done.tokens,
                sampler_logp=done.sampler_logp,
                finish_reason=done.finish_reason,
                text=text,
                verdict=future.result(),
            )
        )
    verified = time.perf_counter()
    tokens = sum(len(r.response_tokens) for r in rollouts)
    return rollouts, {
        "time/sample_s": sampled - start,
        "time/verify_wait_s": verified - sampled,
        "rollout/tokens_per_s": tokens / max(sampled - start, 1e-9),
        "rollout/verified_while_sampling_frac": already / max(len(answers), 1),
        "rollout/dropped_prompts": float(len(problems) * group_size - len(rollouts)) / group_size,
        "rollout/cut_prompts": float(sum(len(p) < len(prompts[i]) for i, p in shown.items())),
    }


def pack_items(
    rollouts: Sequence[Rollout],
    contexts: Sequence[TeacherContext],
    advantages: np.ndarray,
    weights: np.ndarray,
    distill_weights: np.ndarray,
) -> list[PackItem]:
    """One item per response for the packer; all sequences are parallel to `rollouts`."""
    return [
        PackItem(
            prompt_tokens=rollout.prompt_tokens,
            response_tokens=rollout.response_tokens,
            teacher_prompt_tokens=context.prompt_tokens,
            advantage=float(advantage),
            weight=float(weight),
            distill_weight=float(distill_weight),
            sampler_logp=rollout.sampler_logp,
        )
        for rollout, context, advantage, weight, distill_weight in zip(
            rollouts, contexts, advantages, weights, distill_weights, strict=True
        )
    ]
