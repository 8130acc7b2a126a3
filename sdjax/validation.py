"""The check of a config: one sentence that names the bad field, its value and the remedy.

Simple rules stand in two tables, CHOICES and RANGES; what involves several fields has a function.
What needs the model or the data is checked where those are loaded (`sdjax.build`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

MODES = ("train", "sft", "evaluate", "generate", "analyze", "plan", "doctor", "check_rewards")

# Rules that `check` applies: field -> allowed values, or (low, high) with both ends allowed.
CHOICES: Mapping[str, tuple] = {
    "mode": MODES,
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "xla", "splash", "cudnn", "reference"),
    "model.remat": ("none", "dots", "full"),
    "data.on_long_prompt": ("drop", "truncate"),
    "data.on_bad_row": ("skip", "refuse"),
    "data.on_overlap": ("report", "drop"),
    "data.prompt_style": ("auto", "as_is", "bare", "boxed", "answer_line", "opsd"),
    "rollout.cache_dtype": ("auto", "float32", "bfloat16", "int8"),
    "objective.loss_agg": (
        "rows-incl-masked",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "token-mean",
    ),
    "objective.kl_estimator": ("k1", "k2", "k3", "abs"),
    "objective.mod": ("none", "add_u", "anti_phi", "mult_rlsd"),
    "objective.support": ("student_topk", "teacher_topk", "full", "sampled"),
    "objective.rollout_is_level": ("token", "sequence"),
    "teacher.kind": ("fixed", "ema", "snapshot", "live", "trust_region"),
    "teacher.context.kind": ("sibling", "solution", "feedback", "instruction"),
    "teacher.context.fallback": ("none", "solution"),
    "teacher.context.choice": ("first", "random"),
    "teacher.context.strip_style": ("sdpo", "analysis", "trl"),
    "teacher.context.thinking": ("student", "on", "off"),
    "teacher.context.truncate": ("demonstration", "right", "left"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "optimizer.state_dtype": ("float32", "bfloat16"),
    "eval.preset": ("", "paper", "thinking", "non_thinking"),
    "analysis.kind": ("report", "compare", "word_shift", "token_kl", "judge"),
    "sft.init": ("model", "scratch"),
    "sft.source": ("reasoner", "jsonl"),
    "checkpoint.export_dtype": ("float32", "bfloat16", "float16"),
    "checkpoint.export_lora": ("merged", "adapters"),
    "distributed.method": ("auto", "single", "explicit", "slurm", "tpu"),
}
RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "data.subset_size": (1, math.inf),
    "data.max_prompt_len": (1, math.inf),
    "data.limit": (1, math.inf),
    "data.synthetic_size": (1, math.inf),
    "data.overlap_ngram": (1, math.inf),
    "batch.prompts": (1, math.inf),
    "batch.mini_prompts": (1, math.inf),
    "batch.group_size": (1, math.inf),
    "sampling.temperature": (0, math.inf),
    "sampling.top_p": (0, 1),
    "sampling.top_k": (0, math.inf),
    "sampling.min_p": (0, 1),
    "sampling.max_new_tokens": (1, math.inf),
    "rollout.slots": (1, math.inf),
    "rollout.chunk": (1, math.inf),
    "generate.n": (1, math.inf),
    "reward.workers": (1, 1024),
    "reward.deadline_s": (0.01, math.inf),
    "objective.alpha": (0, 1),
    "objective.distillation_topk": (1, math.inf),
    "objective.clip_low": (0, 1),
    "objective.clip_high": (0, math.inf),
    "objective.dual_clip": (1, math.inf),
    "objective.is_clip": (0, math.inf),
    "objective.rollout_is_clip": (0, math.inf),
    "teacher.ema_rate": (0, 1),
    "teacher.snapshot_every": (1, math.inf),
    "teacher.trust_mix": (0, 1),
    "teacher.context.success_threshold": (0, math.inf),
    "teacher.context.max_len": (1, math.inf),
    "teacher.context.reveal_ratio": (0, 1),
    "optimizer.lr": (0, math.inf),
    "optimizer.warmup_steps": (0, math.inf),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip_norm": (0, math.inf),
    "train.steps": (0, math.inf),
    "guard.max_prob_error": (1, math.inf),
    "guard.max_skipped": (1, math.inf),
    "eval.every": (0, math.inf),
    "eval.samples": (1, math.inf),
    "eval.temperature": (0, math.inf),
    "eval.top_p": (0, 1),
    "eval.top_k": (0, math.inf),
    "eval.problems": (1, math.inf),
    "eval.max_new_tokens": (1, math.inf),
    "analysis.min_count": (1, math.inf),
    "analysis.problems": (1, math.inf),
    "analysis.min_tokens": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "log.text_every": (0, math.inf),
    "sft.steps": (1, math.inf),
    "sft.examples": (1, math.inf),
    "sft.rows": (0, math.inf),
    "sft.row_len": (8, math.inf),
    "sft.slots": (0, math.inf),
    "sft.drill_start": (0, 1),
    "sft.drill_until": (0, 1),
    "plan.limit_frac": (0.1, 1.0),
    "distributed.startup_timeout_s": (1, 86400),
    "distributed.heartbeat_timeout_s": (2, 3600),
    "model.lora.rank": (0, math.inf),
    "model.lora.dropout": (0, 1),
}


def field(c: ConfigDict, path: str) -> Any:
    """The value at a dotted path such as "teacher.ema_rate"."""
    for name in path.split("."):
        c = c[name]
    return c


def check(c: ConfigDict, device_count: int | None = None) -> None:
    """Raises ValueError with one sentence naming the first bad field, its value and the remedy."""
    for path, allowed in CHOICES.items():
        if field(c, path) not in allowed:
            raise ValueError(
                f"config.{path} is {field(c, path)!r}, but must be one of {', '.join(allowed)}"
            )
    for path, (low, high) in RANGES.items():
        value = field(c, path)
        if value is not None and not low <= value <= high:
            raise ValueError(f"config.{path} is {value}, but must lie in [{low}, {high}]")
    if c.mode == "train":
        _check_batch(c)
        _check_objective(c)
        _check_sampling(c)
    if device_count is not None and c.mode in ("train", "sft", "evaluate"):
        _check_mesh(c, device_count)


def _check_batch(c: ConfigDict) -> None:
    if c.batch.prompts % c.batch.mini_prompts:
        raise ValueError(
            f"config.batch.mini_prompts is {c.batch.mini_prompts}, which does not divide "
            f"config.batch.prompts = {c.batch.prompts}: choose a divisor of it"
        )


def _check_objective(c: ConfigDict) -> None:
    o = c.objective
    if o.pg_coef == 0 and o.distill_coef == 0:
        raise ValueError(
            "config.objective.pg_coef and config.objective.distill_coef are both 0, so nothing "
            "would be learnt: set one of them"
        )
    if o.support == "sampled" and o.distill_coef and o.alpha != 1:
        raise ValueError(
            f"config.objective.support='sampled' estimates the reverse KL only, but "
            f"config.objective.alpha is {o.alpha}: set alpha=1 or another support"
        )


def _check_sampling(c: ConfigDict) -> None:
    """Refuses importance ratios over the whole vocabulary when the sampler's was cut."""
    s, o = c.sampling, c.objective
    truncated = s.top_p < 1 or s.top_k > 0 or s.min_p > 0
    if truncated and math.isfinite(o.rollout_is_clip) and not o.allow_truncated_sampling:
        raise ValueError(
            f"config.sampling top_p={s.top_p}, top_k={s.top_k}, min_p={s.min_p} cut the sampler's "
            "distribution while importance ratios use the whole one, which biases them: sample "
            "untruncated, or set config.objective.allow_truncated_sampling=True"
        )


def _check_mesh(c: ConfigDict, device_count: int) -> None:
    m = c.mesh
    fixed = m.fsdp * m.tensor * m.context
    data = m.data if m.data != -1 else device_count // fixed
    if data * fixed != device_count or data < 1:
        raise ValueError(
            f"config.mesh data={m.data} x fsdp={m.fsdp} x tensor={m.tensor} x context={m.context} "
            f"does not multiply to the {device_count} devices here: change one of them"
        )
    rows = c.batch.prompts * c.batch.group_size
    if c.mode == "train" and rows % (data * m.fsdp):
        per = data * m.fsdp
        step = per // math.gcd(per, c.batch.group_size)
        lower = c.batch.prompts // step * step
        near = f"{lower} or {lower + step}" if lower else f"{lower + step}"
        raise ValueError(
            f"config.batch.prompts={c.batch.prompts} x group_size={c.batch.group_size} = {rows} "
            f"responses do not split over data x fsdp = {per} devices: nearest are {near} prompts"
        )
