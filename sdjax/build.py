"""What a run is made of, built once from its config: model, mesh, engine, verifiers, data, step.

`for_training` and `for_evaluation` return `Parts`, which do not change while the run lasts; what
does change is the TrainState. Chooses shapes and refuses configs that do not fit the model or the
data, in one sentence. Does not train, sample or save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sdjax import collect, parallel
from sdjax import step as step_lib
from sdjax.analysis import epistemic
from sdjax.data import chat, problems
from sdjax.data.packing import PackingSpec, align
from sdjax.eval_config import EvalConfig
from sdjax.models import from_pretrained, lora
from sdjax.models.config import ModelConfig
from sdjax.objectives.objective import ObjectiveConfig
from sdjax.optimizer import OptimizerConfig
from sdjax.records import Problem
from sdjax.rewards import RewardConfig, VerifierPool
from sdjax.rollout import Engine, EngineConfig
from sdjax.teacher.context import ContextConfig
from sdjax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What sampling and scoring of responses need: model, tokenizer, engine, verifier pool."""

    cfg: ModelConfig
    mesh: Mesh
    style: collect.PromptStyle
    generation: dict[str, Any]
    engine: Engine
    pool: VerifierPool
    eval_sets: dict[str, list[Problem]]
    eval_cfg: EvalConfig


@dataclasses.dataclass(frozen=True)
class Learner:
    """What the update needs; `reference` are the initial parameters if the KL to them is asked."""

    objective: ObjectiveConfig
    context: ContextConfig
    spec: PackingSpec
    step: step_lib.TrainStep
    score: Any
    scalars: step_lib.StepScalars
    reference: Params | None


def sampler(c: ConfigDict, mesh: Mesh) -> tuple[Sampler, Params]:
    """The sampling half of a run, and the loaded parameters (with fresh adapters under LoRA)."""
    model = from_pretrained(c.model.path, mesh)
    cfg, params = model.cfg, model.params
    adapters = lora.from_config(c.model.lora)
    if adapters is not None:
        cfg = dataclasses.replace(cfg, lora=adapters)
        params = lora.add(params, cfg, jax.random.key(c.seed), mesh)
    style = collect.PromptStyle(
        model.tokenizer, c.data.enable_thinking, c.data.system, c.data.chat_template
    )
    engine = Engine(
        lora.without(cfg),
        EngineConfig.from_config(c),
        rollout_mesh(c),
        chat.end_token_ids(model.tokenizer, model.generation),
    )
    pool = VerifierPool(c.reward.workers, c.reward.name, config=RewardConfig.from_config(c))
    sets = {name: problems.load_set(name, c, c.eval.problems) for name in c.eval.sets}
    parts = Sampler(
        cfg, mesh, style, model.generation, engine, pool, sets, EvalConfig.from_config(c)
    )
    return parts, params


def training_mesh(c: ConfigDict) -> Mesh:
    """The mesh of config.mesh over all devices of all processes."""
    return parallel.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context)


def rollout_mesh(c: ConfigDict, local: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh one process samples on: its own devices (`local`), split by config.rollout.tensor.

    Raises ValueError when that does not divide their number. Where it is 0, training's `tensor`
    counts, as far as it divides.
    """
    local = list(jax.local_devices() if local is None else local)
    tensor = c.rollout.tensor
    if tensor == 0:
        tensor = c.mesh.tensor if len(local) % c.mesh.tensor == 0 else 1
    if len(local) % tensor:
        raise ValueError(
            f"rollout.tensor={tensor} does not divide the {len(local)} devices of this host: "
            "choose a divisor, or 0 for training's mesh.tensor"
        )
    return parallel.make_mesh(data=-1, tensor=tensor, devices=local)


def learner(c: ConfigDict, parts: Sampler, params: Params) -> tuple[Learner, TrainState]:
    """The updating half of a run, and the state before its first step; `params` are donated."""
    objective = ObjectiveConfig.from_config(c)
    optimizer = OptimizerConfig.from_config(c)
    config = step_lib.StepConfig.from_config(c, words=epistemic.WORDS)
    reference = None
    if c.log.kl_to_initial or objective.kl_coef:
        copy = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(config.compute_dtype), tree))
        reference = copy(params)
    state = step_lib.init_state(params, objective, optimizer, parts.mesh, c.teacher.kind)
    half = Learner(
        objective=objective,
        context=ContextConfig.from_config(c),
        spec=packing_spec(c, parts.mesh, objective.uses_teacher),
        step=step_lib.make_train_step(parts.cfg, objective, optimizer, parts.mesh, config),
        score=step_lib.make_score(parts.cfg, parts.mesh, config, objective),
        scalars=step_lib.StepScalars(
            knobs=objective.knobs(),
            trust_mix=c.teacher.trust_mix,
            seed=c.seed,
            word_of_token=epistemic_tokens(parts.style.tokenizer, parts.cfg.vocab_size),
        ),
        reference=reference,
    )
    return half, state


def packing_spec(c: ConfigDict, mesh: Mesh, uses_teacher: bool) -> PackingSpec:
    """The one shape of all this run's mini-batches, with room for the longest responses.

    Rows are per process. Micro-batches that stay empty are not computed, so room costs memory on
    the host and little else. Raises ValueError when a row is shorter than the longest sequence.
    """
    response = c.sampling.max_new_tokens
    student = c.data.max_prompt_len + response
    teacher = c.teacher.context.max_len + response if uses_teacher else 0
    row_len = _row_len("row_len", c.batch.row_len, student)
    teacher_row_len = _row_len("teacher_row_len", c.batch.teacher_row_len, teacher)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = c.batch.micro_rows or shards
    if rows % shards or rows % jax.process_count():
        raise ValueError(
            f"config.batch.micro_rows={rows} does not split over mesh data x fsdp = {shards} and "
            f"{jax.process_count()} processes: choose a multiple of both"
        )
    per_row = row_len // student
    if teacher:
        per_row = min(per_row, teacher_row_len // teacher)
    responses = c.batch.mini_prompts * c.batch.group_size
    micro_batches = -(-responses // (per_row * rows))
    return PackingSpec(
        micro_batches, rows // jax.process_count(), row_len, teacher_row_len, row_len
    )


def _row_len(name: str, wanted: int, longest: int) -> int:
    """The aligned row length; 0 takes the longest sequence that may occur."""
    if wanted and wanted < longest:
        raise ValueError(
            f"config.batch.{name}={wanted} is shorter than a prompt and a response at their limits "
            f"({longest} tokens): raise it, or lower the limits"
        )
    return align(wanted or longest) if longest else 0


def epistemic_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """int32 [V]: i + 1 for tokens that spell the i-th epistemic word, else 0.

    Leading blanks and letter case do not matter; words of several tokens are not covered.
    """
    classes = {word: i for i, word in enumerate(epistemic.WORDS, start=1)}
    table = np.zeros(vocab_size, np.int32)
    for token_id in range(min(len(tokenizer), vocab_size)):
        table[token_id] = classes.get(chat.decode(tokenizer, [token_id]).strip().lower(), 0)
    return table


def full_params(state: TrainState, cfg: ModelConfig) -> Params:
    """The student as plain parameters: adapters merged, what the engine and the export take."""
    return lora.merge(lora.join(state.params, state.frozen), cfg)
