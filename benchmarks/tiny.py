"""Accuracy, length and epistemic words of a tiny model, with and without privileged context.

    python benchmarks/tiny.py [--model=tiny] [--problems=200] [--samples=4]

One JSON line per split and context, at temperature 1. Contexts: none; thinking off; a correct
response of the model itself (the teacher's prompt of training), whole and without its think part;
the worked solution; and a correct response with the paper's line that asks for uncertainty.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json

import numpy as np

from sdjax import collect
from sdjax.analysis import epistemic
from sdjax.data import chat, synthetic
from sdjax.models import from_pretrained
from sdjax.parallel import make_mesh
from sdjax.records import Problem, Rollout, SamplingParams
from sdjax.rewards import VerifierPool
from sdjax.rollout import Engine, EngineConfig
from sdjax.teacher.templates import PRESETS
from sdjax.teacher.thinking import strip_analysis


def shown(problem: Problem, text: str, preset: str = "paper") -> Problem:
    """The problem with `text` as the correct solution in its prompt."""
    turn = PRESETS[preset].user_turn(prompt=problem.prompt, question=problem.prompt, solution=text)
    return dataclasses.replace(problem, prompt=turn)


def first_correct(rollouts: list[Rollout]) -> dict[str, str]:
    """Problem id -> text of its first correct response."""
    found: dict[str, str] = {}
    for rollout in rollouts:
        if rollout.verdict.correct:
            found.setdefault(rollout.problem.id, rollout.text)
    return found


def summary(rollouts: list[Rollout]) -> dict:
    """Accuracy (whole and by family), length in tokens, epistemic words per response."""
    families = collections.defaultdict(list)
    for rollout in rollouts:
        families[rollout.problem.meta["family"]].append(rollout.verdict.correct)
    lengths = [len(r.response_tokens) for r in rollouts]
    return {
        "responses": len(rollouts),
        "accuracy": round(float(np.mean([r.verdict.correct for r in rollouts])), 3),
        "families": {k: round(float(np.mean(v)), 3) for k, v in sorted(families.items())},
        "length_mean": round(float(np.mean(lengths)), 1),
        "length_p95": float(np.percentile(lengths, 95)),
        "truncated": round(float(np.mean([r.truncated for r in rollouts])), 4),
        "epistemic": round(
            float(np.mean([sum(epistemic.count(r.text).values()) for r in rollouts])), 3
        ),
    }


def views(problems: list[Problem], plain: list[Rollout]) -> list[tuple[str, list[Problem], bool]]:
    """(name of the context, the problems with it, thinking on) besides the plain one.

    A sibling can be shown for solved problems only, which are the easier ones.
    """
    demo = first_correct(plain)
    solved = [p for p in problems if p.id in demo]
    return [
        ("no_think", problems, False),
        ("sibling", [shown(p, demo[p.id]) for p in solved], True),
        ("sibling_without_think", [shown(p, strip_analysis(demo[p.id])) for p in solved], True),
        ("worked_solution", [shown(p, p.solution) for p in problems], True),
        ("sibling_uncertain", [shown(p, demo[p.id], "uncertainty") for p in solved], True),
    ]


def report(split: str, context: str, rollouts: list[Rollout]) -> None:
    """Prints one line."""
    print(json.dumps({"split": split, "context": context} | summary(rollouts)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--splits", default=",".join(synthetic.DISTRIBUTIONS))
    parser.add_argument("--only", default="", help="contexts to run, all when empty")
    args = parser.parse_args()

    model = from_pretrained(args.model, make_mesh())
    limits = EngineConfig(slots=128, max_prompt_len=384, max_new_tokens=192)
    ends = chat.end_token_ids(model.tokenizer, model.generation)
    engine = Engine(model.cfg, limits, make_mesh(), ends)
    params = engine.prepare(model.params)
    sampling = SamplingParams(max_new_tokens=192)

    with VerifierPool(workers=1) as pool:

        def sample(problems: list[Problem], thinking: bool, step: int) -> list[Rollout]:
            style = collect.PromptStyle(model.tokenizer, thinking, None, None)
            return collect.sample_and_verify(
                engine, params, pool, style, problems, args.samples, sampling,
                seed=args.seed, step=step,
            )[0]  # fmt: skip

        for split in args.splits.split(","):
            problems = synthetic.make_problems(split, args.problems, seed=args.seed)
            plain = sample(problems, True, 0)
            report(split, "none", plain)
            for step, (name, asked, thinking) in enumerate(views(problems, plain), start=1):
                if not args.only or name in args.only.split(","):
                    report(split, name, sample(asked, thinking, step))


if __name__ == "__main__":
    main()
