"""What the trainer is told of prompts that the engine had to drop or to cut."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest

from sdjax import collect
from sdjax.records import Problem, SamplingParams, Verdict


class Style:
    """Prompts are the numbers in the problem's text."""

    class tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    tokenizer = tokenizer()

    def encode(self, problem):
        return np.arange(3, 3 + int(problem.prompt), dtype=np.int32)


class Pool:
    def submit(self, response, gold):
        future = Future()
        future.set_result(Verdict(False, None, "ok"))
        return future


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_the_trainer_scores_the_prompt_that_was_sampled_from(params, engine, policy, monkeypatch):
    """Catches rollouts that carry a whole prompt where the sampler saw the end of it."""
    monkeypatch.setattr(engine, "cfg", dataclasses.replace(engine.cfg, on_long_prompt=policy))
    limit = engine.cfg.max_prompt_len
    problems = [Problem("a", str(limit + 5), "1"), Problem("b", "4", "1")]
    rollouts, metrics = collect.sample_and_verify(
        engine,
        params,
        Pool(),
        Style(),
        problems,
        2,
        SamplingParams(max_new_tokens=3),
        seed=0,
        step=1,
    )
    lengths = {r.group: len(r.prompt_tokens) for r in rollouts}
    if policy == "drop":
        assert lengths == {1: 4} and metrics["rollout/dropped_prompts"] == 1
        assert metrics["rollout/cut_prompts"] == 0
    else:
        assert lengths == {0: limit, 1: 4} and metrics["rollout/cut_prompts"] == 1
        assert rollouts[0].prompt_tokens.tolist() == list(range(8, limit + 8))
        assert metrics["rollout/dropped_prompts"] == 0
