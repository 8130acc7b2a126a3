"""The training loop. Each step, in this order:

1. sample and verify   responses to the batch's problems; verdicts arrive while others are sampled
2. teach               choose what the teacher sees for each response
3. pack                the mini-batch of each optimizer update into rows
4. step                one compiled call per mini-batch: losses, gradient, update; then the teacher
5. log, evaluate, save

Everything is a function of (config, step) and the TrainState, so a run that was killed goes on as
if it never had been. What a run is made of is set up once, in `sdjax.build`.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import time

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sdjax import build, collect, config, distributed, profiling
from sdjax.analysis import report
from sdjax.checkpoint import Checkpoints, bind_workdir
from sdjax.data import packing
from sdjax.data.problems import training_problems
from sdjax.data.sampler import ProblemSampler
from sdjax.evaluate import evaluate
from sdjax.metrics import EVALUATED, MetricsWriter, rollout_metrics
from sdjax.models import hf, lora, peft
from sdjax.objectives import guards
from sdjax.objectives.advantages import group_advantage
from sdjax.objectives.aggregation import response_weights
from sdjax.progress import Progress
from sdjax.records import Rollout, SamplingParams, TeacherContext
from sdjax.step import put_batch, update_teacher
from sdjax.teacher.context import build_contexts, context_metrics
from sdjax.types import PackedBatch, TrainState

log = logging.getLogger(__name__)
EXPORT_DIR = "export"


def run(
    c: ConfigDict, workdir: str, stop: distributed.StopSignal | None = None
) -> epath.Path | None:
    """Trains from the newest checkpoint of `workdir`, or from the start; returns the report's path.

    None when `stop` ended the run early: its state is saved and the same command goes on.
    """
    stop = stop or distributed.StopSignal()
    config.check(c, jax.device_count())
    bind_workdir(workdir, c)
    parts, params = build.sampler(c, build.training_mesh(c))
    learner, state = build.learner(c, parts, params)
    del params  # the state holds them now, and the step donates it
    problems = training_problems(c, parts.style.tokenizer, parts.pool, parts.eval_sets)
    data = ProblemSampler(problems, c.batch.prompts, c.seed, c.data.subset_size)
    checkpoints = Checkpoints(workdir, c.checkpoint.keep, c.checkpoint.best_metric)
    restored = checkpoints.restore(state)
    state = state if restored is None else restored
    start = int(state.step) // updates_per_batch(c)
    if c.rollout.warm_up:
        parts.engine.warm_up(build.full_params(state, parts.cfg))
    tracer = profiling.Tracer(c, workdir)
    with (
        parts.pool,
        MetricsWriter(workdir, None if restored is None else start) as writer,
        Progress(c.train.steps, start=start, enabled=jax.process_index() == 0) as progress,
    ):
        missing = _evaluates(c, start) and not writer.evaluated(start)  # a signal came then
        if restored is None or (missing and parts.eval_sets):
            scores = _evaluate(parts, state, start, stop)
            if scores is None:
                return _stop(writer, checkpoints, progress, start, state)
            writer.write(start, scores)
        for step in range(start + 1, c.train.steps + 1):
            try:
                with tracer.step(step):
                    state, metrics = train_batch(c, parts, learner, state, data, step, writer, stop)
            except distributed.StopRequested:
                return _stop(writer, checkpoints, progress, step - 1, state)
            scores = _evaluate(parts, state, step, stop) if _evaluates(c, step) else {}
            stopping = scores is None  # the next start evaluates what is saved now
            metrics |= scores or {}
            writer.write(step, metrics)
            progress.update(step, metrics)
            guards.check_prob_error(metrics, c.guard.max_prob_error)
            guards.check_skipped(metrics, c.guard.max_skipped)
            if step < c.train.steps and not stopping:  # after the last, all is done
                stopping = stop.agreed()
            if stopping or step % c.checkpoint.every == 0 or step == c.train.steps:
                writer.flush()  # rows of a step are on disk before its checkpoint
                checkpoints.save(step, state, metrics)
            if stopping:
                return _stop(writer, checkpoints, progress, step, state)
    checkpoints.close()
    return _finish(c, parts, state, workdir)


def _stop(
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    progress: Progress,
    step: int,
    state: TrainState,
) -> None:
    """Saves the state after `step` unless that is done already, and says so."""
    writer.flush()
    checkpoints.save(step, state)
    checkpoints.close()
    progress.note(f"stopped after step {step}: the same command goes on from there")


def _evaluates(c: ConfigDict, step: int) -> bool:
    """Whether the student is evaluated after `step`; 0 is before training."""
    return step in (0, c.train.steps) or bool(c.eval.every and step % c.eval.every == 0)


def updates_per_batch(c: ConfigDict) -> int:
    """Optimizer updates per training batch."""
    return c.batch.prompts // c.batch.mini_prompts


def train_batch(
    c: ConfigDict,
    parts: build.Sampler,
    learner: build.Learner,
    state: TrainState,
    data: ProblemSampler,
    step: int,
    writer: MetricsWriter,
    stop: distributed.StopSignal,
) -> tuple[TrainState, dict[str, float]]:
    """Stages 1 to 4 on the problems of `step`. Returns the new state and what was measured.

    Raises StopRequested, in all processes, when the run is to stop before the first update: most of
    a batch's time is sampling, and a grace period is shorter than that.
    """
    began = time.perf_counter()
    groups = process_groups(c, jax.process_index(), jax.process_count())
    problems = data.batch(step - 1)
    with contextlib.suppress(distributed.StopRequested):
        rollouts, metrics = collect.sample_and_verify(
            parts.engine,
            parts.engine.prepare(build.full_params(state, parts.cfg)),
            parts.pool,
            parts.style,
            [problems[group] for group in groups],
            c.batch.group_size,
            sampling_params(c),
            seed=c.seed,
            step=step,
            groups=groups,
            on_tokens=stop.interrupt,
        )
    if stop.agreed():
        raise distributed.StopRequested
    collected = time.perf_counter()
    contexts, context_counts = _contexts(c, parts, learner, rollouts, step)
    batches = [
        put_batch(
            packing.pack(
                items,
                learner.spec,
                skip_first=c.objective.skip_first,
                prefix_len=c.objective.prefix_len,
            ),
            parts.mesh,
        )
        for items in _mini_batches(c, learner, rollouts, contexts)
    ]
    packed = time.perf_counter()
    batches = [_with_scores(learner, state, batch, len(batches)) for batch in batches]
    updates = []
    for batch in batches:
        state, update = learner.step(state, batch, learner.scalars)
        updates.append(update)
    metrics |= _mean_over_updates(jax.device_get(updates))
    if metrics["optim/skipped"] < 1:  # a batch whose updates were all skipped moves no teacher
        state = update_teacher(state, teacher_rate(c, step))
    stepped = time.perf_counter()
    metrics |= rollout_metrics(rollouts) | context_counts
    metrics |= {f"verifier/{name}": count for name, count in parts.pool.stats().items()}
    metrics |= {
        "time/pack_s": packed - collected,
        "time/step_s": stepped - packed,
        "time/total_s": stepped - began,
        "step/tokens_per_s": metrics["batch/response_tokens"] * len(batches) / (stepped - packed),
        "step/compilations": learner.step.compilations,
        "memory/peak_gb": peak_memory_gb(),
        "data/epoch": data.epoch(step),
    }
    if c.log.text_every and step % c.log.text_every == 0:
        _log_texts(writer, step, c.log.text_samples, rollouts, contexts)
    if jax.process_count() > 1:
        metrics = distributed.merge_metrics(metrics, ("verifier/",), ("memory/", "time/"))
    return state, metrics


def process_groups(c: ConfigDict, process_index: int, process_count: int) -> list[int]:
    """Which problems of a training batch one process samples: an equal share of each mini-batch.

    So the mini-batches are the same for any number of processes. Raises ValueError when one does
    not split.
    """
    mini = c.batch.mini_prompts
    if mini % process_count:
        raise ValueError(
            f"config.batch.mini_prompts={mini} does not split over {process_count} processes: "
            f"choose a multiple of {process_count}"
        )
    share = mini // process_count
    starts = range(process_index * share, c.batch.prompts, mini)
    return [start + i for start in starts for i in range(share)]


def sampling_params(c: ConfigDict) -> SamplingParams:
    """How training responses are sampled."""
    s = c.sampling
    return SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p, s.max_new_tokens)


def teacher_rate(c: ConfigDict, step: int) -> float:
    """How far the teacher's weights move to the student's after training batch `step`."""
    if c.teacher.kind == "ema":
        return c.teacher.ema_rate
    if c.teacher.kind == "snapshot":
        return float(step % c.teacher.snapshot_every == 0)
    return 0.0


def _contexts(
    c: ConfigDict,
    parts: build.Sampler,
    learner: build.Learner,
    rollouts: list[Rollout],
    step: int,
) -> tuple[list[TeacherContext], dict[str, float]]:
    """What the teacher sees for each rollout; nothing for an objective without a teacher."""
    if not learner.objective.uses_teacher:
        return [TeacherContext(None, "none")] * len(rollouts), {}
    style = parts.style
    contexts, counts = build_contexts(
        rollouts,
        learner.context,
        style.tokenizer,
        enable_thinking=style.enable_thinking,
        system=style.system,
        chat_template=style.chat_template,
        seed=c.seed,
        step=step,
    )
    return contexts, context_metrics(counts)


def _mini_batches(
    c: ConfigDict,
    learner: build.Learner,
    rollouts: list[Rollout],
    contexts: list[TeacherContext],
) -> list[list[packing.PackItem]]:
    """The packer's items of each optimizer update, in the order of the groups.

    Advantages are taken within groups, aggregation weights over the whole mini-batch of all
    processes.
    """
    o = learner.objective
    mini = c.batch.mini_prompts
    groups = np.array([rollout.group for rollout in rollouts])
    rewards = np.array([rollout.verdict.reward for rollout in rollouts])
    advantages = group_advantage(rewards, groups, o.norm_adv_by_std, o.adv_eps)
    batches = []
    for start in range(0, c.batch.prompts, mini):
        chosen = np.flatnonzero((groups >= start) & (groups < start + mini))
        part = [rollouts[i] for i in chosen]
        seen = [contexts[i] for i in chosen]
        weights, distill_weights = _weights(c, learner, part, seen)
        batches.append(collect.pack_items(part, seen, advantages[chosen], weights, distill_weights))
    return batches


def _weights(
    c: ConfigDict, learner: build.Learner, part: list[Rollout], seen: list[TeacherContext]
) -> tuple[np.ndarray, np.ndarray]:
    """Aggregation weights of this process's responses, normalised over those of all processes."""
    o = learner.objective
    rows = [
        (len(rollout.response_tokens), context.has_teacher)
        for rollout, context in zip(part, seen, strict=True)
    ]
    everyone = distributed.allgather_objects(rows)
    before = sum(len(rows) for rows in everyone[: jax.process_index()])
    lengths, has_teacher = zip(*(row for rows in everyone for row in rows), strict=True)
    both = response_weights(
        np.array(lengths),
        np.array(has_teacher),
        o.loss_agg,
        norm_n=o.norm_n,
        padded_len=c.sampling.max_new_tokens,
        skip_first=o.skip_first,
        prefix_len=o.prefix_len,
    )
    return both[0][before : before + len(rows)], both[1][before : before + len(rows)]


def _with_scores(
    learner: build.Learner, state: TrainState, batch: PackedBatch, updates: int
) -> PackedBatch:
    """Adds the log-probabilities that need a forward pass before the first update of the batch.

    With one update per batch the old policy is the current one and needs none.
    """
    if updates > 1:
        current = lora.join(state.params, state.frozen)
        batch = batch.replace(old_logp=learner.score(current, batch)["student_logp"])
    if learner.reference is not None:
        batch = batch.replace(ref_logp=learner.score(learner.reference, batch)["student_logp"])
    return batch


def _mean_over_updates(updates: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The metrics of a batch's updates, averaged; counters keep their last value."""
    mean = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    last = "optim/skipped_in_a_row"
    return mean | {last: float(updates[-1][last])}


def _evaluate(
    parts: build.Sampler, state: TrainState, step: int, stop: distributed.StopSignal
) -> dict[str, float] | None:
    """Scores of the current student on the evaluation sets; None when `stop` ended it early."""
    if not parts.eval_sets:
        return {}
    began = time.perf_counter()
    try:
        result = evaluate(
            parts.engine,
            parts.engine.prepare(build.full_params(state, parts.cfg)),
            parts.pool,
            parts.style,
            parts.eval_sets,
            parts.eval_cfg,
            step=step,
            stop=stop,
        )
    except distributed.StopRequested:
        return None
    return result.metrics | {EVALUATED: time.perf_counter() - began}


def _log_texts(
    writer: MetricsWriter,
    step: int,
    samples: int,
    rollouts: list[Rollout],
    contexts: list[TeacherContext],
) -> None:
    """A few responses with their verdicts, those with a teacher first, and what the teacher saw."""
    pairs = sorted(zip(rollouts, contexts, strict=True), key=lambda pair: not pair[1].has_teacher)
    for i, (rollout, context) in enumerate(pairs[:samples]):
        verdict = rollout.verdict
        writer.text(
            step,
            f"rollout/{i}",
            f"{rollout.problem.prompt}\n--- response ({rollout.finish_reason}; answer "
            f"{rollout.problem.answer!r}, read {verdict.extracted!r}: {verdict.reason})\n"
            f"{rollout.text}",
        )
        if context.has_teacher:
            writer.text(step, f"teacher/{i}", context.text)


def peak_memory_gb() -> float:
    """Peak memory so far: of the fullest device where it tells, else of this process."""
    stats = [d.memory_stats() for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _export(c: ConfigDict, parts: build.Sampler, state: TrainState, folder: str) -> None:
    """The student as a Hugging Face folder, or its adapters alone as one of PEFT's."""
    dtype = c.checkpoint.export_dtype
    if parts.cfg.lora is not None and c.checkpoint.export_lora == "adapters":
        params = lora.join(state.params, state.frozen)
        peft.save_adapters(folder, parts.cfg, params, c.model.path, dtype)
        return
    hf.save(
        folder,
        lora.without(parts.cfg),
        build.full_params(state, parts.cfg),
        tokenizer=parts.style.tokenizer,
        generation_config=parts.generation,
        dtype=dtype,
    )


def _finish(
    c: ConfigDict, parts: build.Sampler, state: TrainState, workdir: str
) -> epath.Path | None:
    """Exports the student, writes the report and says where they are."""
    if c.checkpoint.export:
        _export(c, parts, state, str(epath.Path(workdir) / EXPORT_DIR))
    if jax.process_index() != 0:
        return None
    path = report.write_report(workdir)
    log.info("the run is complete: report %s, model %s", path, epath.Path(workdir) / EXPORT_DIR)
    return path
