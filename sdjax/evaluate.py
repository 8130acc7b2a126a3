"""avg@k and pass@k on named problem sets, with the paper's sampling settings (Table 11).

1. render the prompts of all sets, k samples each, one call of the engine (it drains only once);
2. verify each response in the worker pool while others are still being sampled;
3. per set: scores, lengths, truncation, epistemic words; per response: a row for later analyses.

`evaluate` is what training calls between its steps; mode='evaluate' runs it alone on `model.path`
and writes `eval/results.json`, `eval/responses.jsonl` and `eval/table.md` into the workdir. The
responses are a function of (config.seed, step, set, problem), not of the other sets. Does not train
and does not choose checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sdjax import build, distributed
from sdjax.analysis import epistemic, tables
from sdjax.collect import PromptStyle, stream_seed
from sdjax.data import chat
from sdjax.data.golds import warn_about_golds
from sdjax.eval_config import EvalConfig
from sdjax.records import FINISH_LENGTH, Completion, Problem, Request, Verdict

LOG = logging.getLogger(__name__)

_EVAL_STREAM = 2  # another one than collect's

# What is measured of each response, in this order on the last axis of `stats_PKF`.
FIELDS = ("seen", "correct", "length", "truncated", "bounded", *epistemic.WORDS)


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """`metrics` are flat `eval/<set>/<name>` numbers; `rows` one JSON-ready dict per response.

    On several processes the metrics cover all problems and the rows this process's own.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    engine: Any,
    params: Any,
    pool: Any,
    style: PromptStyle,
    sets: Mapping[str, Sequence[Problem]],
    cfg: EvalConfig,
    *,
    step: int = 0,
    stop: distributed.StopSignal | None = None,
) -> EvalResult:
    """Samples, verifies and measures `cfg.samples` responses to each problem of each set.

    `engine` is a `rollout.Engine`, `params` what its `prepare` gave, `pool` a started
    `rewards.VerifierPool`. Every process takes its share of the problems. Raises ValueError on an
    empty set, StopRequested, in all processes, when `stop` asks for it before all is sampled.
    """
    stop = stop or distributed.StopSignal()
    jobs = _jobs(sets, style, cfg, step)
    verdicts: dict[tuple[int, int], Future[Verdict]] = {}
    texts: dict[tuple[int, int], str] = {}

    def verify(completion: Completion) -> None:
        key = (completion.request_id, completion.index)
        problem = jobs[completion.request_id].problem
        texts[key] = chat.decode(style.tokenizer, completion.tokens)
        graded = after_think(texts[key]) if cfg.grade_after_think else texts[key]
        verdicts[key] = pool.submit(graded, problem.answer)

    with contextlib.suppress(distributed.StopRequested):
        requests = [job.request for job in jobs.values()]
        completions = engine.generate(params, requests, verify, on_tokens=stop.interrupt)
    if stop.agreed():
        raise distributed.StopRequested
    stats = {
        name: np.zeros((len(problems), cfg.samples, len(FIELDS)), np.float32)
        for name, problems in sets.items()
    }
    rows = []
    for completion in completions:
        job = jobs[completion.request_id]
        key = (completion.request_id, completion.index)
        row = _row(job, completion, texts[key], verdicts[key].result())
        stats[job.set_name][job.index, completion.index] = _measure(row)
        rows.append(row)
    metrics: dict[str, float] = {}
    for name, stats_PKF in stats.items():
        metrics |= set_metrics(name, _over_processes(stats_PKF), cfg.pass_at)
    return EvalResult(metrics, rows)


def set_metrics(name: str, stats_PKF: np.ndarray, pass_at: Sequence[int]) -> dict[str, float]:
    """Metrics of one set; stats_PKF [problems, samples, FIELDS].

    Problems without a response (a prompt over the engine's limit) count in `missing_frac` and as
    wrong. `stderr` is the standard error of avg@k over problems, the samples of one problem being
    dependent.
    """
    if stats_PKF.shape[0] == 0:
        raise ValueError(f"evaluation set {name!r} has no problems: check config.eval.sets")
    samples = stats_PKF.shape[1]
    column = {field: stats_PKF[..., i] for i, field in enumerate(FIELDS)}
    seen = max(column["seen"].sum(), 1.0)
    mean = lambda field: float(column[field].sum() / seen)
    score_P = column["correct"].mean(axis=1)
    words = sum(mean(word) for word in epistemic.WORDS)
    spread = score_P.std(ddof=1) / np.sqrt(len(score_P)) if len(score_P) > 1 else np.nan
    lengths = column["length"][column["seen"] > 0]
    out = {
        f"avg@{samples}": float(score_P.mean()),
        "stderr": float(spread),
        "response_len_mean": mean("length"),
        "response_len_p95": float(np.percentile(lengths, 95)) if lengths.size else np.nan,
        "truncated_frac": mean("truncated"),
        "missing_frac": float(1.0 - column["seen"].mean()),
        "epistemic_per_response": words,
        "epistemic_per_1k_tokens": epistemic.per_1000_tokens(words, mean("length")),
        "epistemic_bounded_per_response": mean("bounded"),
    }
    correct_P = column["correct"].sum(axis=1).astype(int)
    out |= {f"pass@{k}": float(np.mean(pass_at_k(correct_P, samples, k))) for k in pass_at}
    out |= {f"word/{word}": mean(word) for word in epistemic.WORDS}
    return {f"eval/{name}/{key}": value for key, value in out.items()}


def pass_at_k(correct_P: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem from `samples` >= k draws of which `correct_P` are right.

      1 - C(n - c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k / i)

    Chen et al. 2021 (https://arxiv.org/abs/2107.03374), equation 1; at k = n it is "any".
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, got {samples}")
    wrong_P = samples - np.asarray(correct_P)
    index_N = np.arange(1, samples + 1)
    factor_PN = np.where(index_N > wrong_P[:, None], 1.0 - k / index_N, 1.0)
    factor_PN = np.maximum(factor_PN, 0.0)  # i < k: fewer than k wrong ones, so one must be right
    return 1.0 - factor_PN.prod(axis=1)


def after_think(text: str) -> str:
    """The text after the first closed `<think>...</think>`, the whole text when there is none.

    What the paper's script grades with thinking on (METHODS 3.8); DeepSeek's responses have no
    opening tag, so they are graded whole.
    """
    start = text.find("<think>")
    end = text.find("</think>", start) if start >= 0 else -1
    return text[end + len("</think>") :] if end >= 0 else text


@dataclasses.dataclass(frozen=True)
class _Job:
    set_name: str
    index: int
    problem: Problem
    request: Request


def _jobs(
    sets: Mapping[str, Sequence[Problem]], style: PromptStyle, cfg: EvalConfig, step: int
) -> dict[int, _Job]:
    """This process's requests by id; a set's ids, and so its samples, do not depend on others."""
    seed = stream_seed(cfg.seed, step, _EVAL_STREAM)
    sampling = dataclasses.replace(cfg.sampling, seed=seed)
    jobs: dict[int, _Job] = {}
    taken: set[int] = set()
    for name, problems in sets.items():
        if not problems:
            raise ValueError(f"evaluation set {name!r} has no problems: check config.eval.sets")
        mark = zlib.crc32(name.encode()) & 0x3FF
        while mark in taken:  # two names with one mark; the earlier one keeps it
            mark = (mark + 1) & 0x3FF
        taken.add(mark)
        for index in range(jax.process_index(), len(problems), jax.process_count()):
            prompt = style.encode(problems[index])
            request = Request(
                id=mark << 20 | index,
                prompt_tokens=tuple(map(int, prompt)),
                n=cfg.samples,
                sampling=sampling,
            )
            jobs[request.id] = _Job(name, index, problems[index], request)
    return jobs


def _row(job: _Job, completion: Completion, text: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "set": job.set_name,
        "problem": job.problem.id,
        "index": completion.index,
        "response": text,
        "answer": job.problem.answer,
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "length": len(completion.tokens),
        "truncated": completion.finish_reason == FINISH_LENGTH,
    }


def _measure(row: Mapping[str, Any]) -> list[float]:
    """The FIELDS of one response."""
    counts = epistemic.count(row["response"])
    bounded = epistemic.total(epistemic.count_bounded(row["response"]))
    values = [1.0, row["correct"], row["length"], row["truncated"], bounded]
    return [float(value) for value in values] + [float(counts[word]) for word in epistemic.WORDS]


def _over_processes(stats_PKF: np.ndarray) -> np.ndarray:
    """Joins the shares of all processes; each has zeros where others have numbers."""
    return distributed.allgather_host(stats_PKF).sum(axis=0, dtype=np.float64)


def write_results(result: EvalResult, cfg: EvalConfig, model: str, folder: epath.Path) -> None:
    """`results.json`, `table.md` (process 0) and `responses.jsonl`, one file per process."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = jax.process_count() == 1
    name = "responses.jsonl" if alone else f"responses-{jax.process_index():05d}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    if jax.process_index() == 0:
        table = tables.evaluation(result.metrics)
        (folder / "table.md").write_text(f"`{model}`, {_settings(cfg)}\n\n{table}")
        metrics = {k: None if math.isnan(v) else v for k, v in result.metrics.items()}
        facts = {"model": model, "eval": dataclasses.asdict(cfg), "metrics": metrics}
        (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def _settings(cfg: EvalConfig) -> str:
    s = cfg.sampling
    text = f"{cfg.samples} samples, temperature {s.temperature}, top-p {s.top_p}"
    return f"{text}, top-k {s.top_k or 'off'}, at most {s.max_new_tokens} tokens, seed {cfg.seed}"


def run(c: ConfigDict, workdir: str, stop: distributed.StopSignal | None = None) -> None:
    """mode='evaluate': evaluates `model.path` on `eval.sets` and writes the results to `eval/`."""
    if stop is not None:
        stop.restore()  # there is nothing to save: a signal ends an evaluation
    parts, params = build.sampler(c, build.training_mesh(c))
    cfg, engine = parts.eval_cfg, parts.engine
    with parts.pool:
        warn_about_golds(parts.eval_sets, parts.pool, c.reward.name)
        prepared = engine.prepare(params)
        if c.rollout.warm_up:
            engine.warm_up(prepared)
        result = evaluate(engine, prepared, parts.pool, parts.style, parts.eval_sets, cfg)
    folder = epath.Path(workdir) / "eval"
    write_results(result, cfg, c.model.path, folder)
    if jax.process_index() == 0:
        print(tables.evaluation(result.metrics))
        LOG.info("wrote %s", folder)
