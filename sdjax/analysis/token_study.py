"""Table 6 for a model: samples, builds the teacher's contexts, and measures divergence by token.

    python -m sdjax.main --config=configs/tiny.py --config.mode=analyze \\
        --config.analysis.kind=token_kl --workdir=runs/token-kl

Writes token_kl.md (divergence by surface form), token_kl.jsonl (one response per line, with its
tokens and divergences) and token_kl.html (the first responses, coloured). Student and teacher have
the same weights, those of `model.path`; only what they see differs. One process.
"""

from __future__ import annotations

import html
import itertools
import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sdjax import build, collect
from sdjax.analysis import token_kl
from sdjax.data import chat
from sdjax.data.problems import load_problems
from sdjax.records import Rollout, SamplingParams, TeacherContext
from sdjax.teacher.context import ContextConfig, build_contexts

COLOURED = 8  # responses in the page


def run(c: ConfigDict, workdir: str) -> epath.Path:
    """Measures `analysis.problems` groups of the training data; returns the table's path."""
    c = c.copy_and_resolve_references()
    c.eval.sets = ()
    parts, params = build.sampler(c, build.training_mesh(c))
    s = c.sampling
    with parts.pool:
        rollouts, _ = collect.sample_and_verify(
            parts.engine,
            parts.engine.prepare(params),
            parts.pool,
            parts.style,
            load_problems(c, parts.style.tokenizer)[: c.analysis.problems],
            c.batch.group_size,
            SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p, s.max_new_tokens),
            seed=c.seed,
            step=0,
        )
    contexts, _ = build_contexts(
        rollouts,
        ContextConfig.from_config(c),
        parts.style.tokenizer,
        enable_thinking=parts.style.enable_thinking,
        system=parts.style.system,
        chat_template=parts.style.chat_template,
        seed=c.seed,
    )
    with jax.set_mesh(parts.mesh):
        rows = [
            _measure(parts, params, rollout, context, s.temperature or 1.0)
            for rollout, context in zip(rollouts, contexts, strict=True)
            if context.has_teacher
        ]
    if not rows:
        raise ValueError(
            f"none of {len(rollouts)} responses has a teacher context: take more "
            "config.analysis.problems, or set config.teacher.context.fallback=solution"
        )
    return _write(epath.Path(workdir), rows, len(rollouts), c.analysis.min_tokens)


def _measure(
    parts: build.Sampler,
    params: Any,
    rollout: Rollout,
    context: TeacherContext,
    temperature: float,
) -> dict[str, Any]:
    """One response with its tokens as text and the divergence at each."""
    kl_R = token_kl.response_kl(
        params,
        params,
        parts.cfg,
        rollout.prompt_tokens,
        context.prompt_tokens,
        rollout.response_tokens,
        temperature,
    )
    tokenizer = parts.style.tokenizer
    return {
        "problem": rollout.problem.id,
        "index": rollout.index,
        "correct": rollout.verdict.correct,
        "context": context.kind,
        "tokens": [chat.decode(tokenizer, [t], False) for t in rollout.response_tokens],
        "divergence": [round(float(value), 6) for value in kl_R],
    }


def _write(
    folder: epath.Path, rows: list[dict[str, Any]], sampled: int, min_tokens: int
) -> epath.Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = list(itertools.chain.from_iterable(row["divergence"] for row in rows))
    tokens = list(itertools.chain.from_iterable(row["tokens"] for row in rows))
    table = token_kl.table(token_kl.by_token(values, tokens, min_tokens))
    head = (
        f"KL(student || teacher) at {len(tokens)} tokens of {len(rows)} responses ({sampled} "
        f"sampled, the others have no teacher context); mean {sum(values) / len(values):.4f} nats; "
        f"forms that occur at least {min_tokens} times.\n\n"
    )
    path = folder / "token_kl.md"
    path.write_text(head + table, encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "token_kl.jsonl").write_text(lines, encoding="utf-8")
    page = [
        f"<p>{html.escape(row['problem'])}, response {row['index']}, "
        f"{'right' if row['correct'] else 'wrong'}</p>"
        + token_kl.coloured_html(row["tokens"], row["divergence"])
        for row in rows[:COLOURED]
    ]
    (folder / "token_kl.html").write_text(
        '<!doctype html><meta charset="utf-8">' + "\n".join(page), encoding="utf-8"
    )
    return path
