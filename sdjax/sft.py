"""Supervised training, `mode='sft'`: cross-entropy on the responses, prompts are only read.

Each step: take the step's examples, pack them into rows, one compiled update, log, save. The tiny
model is pretrained through this path (configs/tiny_pretrain.py), and any model can be trained on a
file of prompts and responses. Trains all parameters; does not sample or evaluate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sdjax import config, parallel
from sdjax.checkpoint import Checkpoints, bind_workdir
from sdjax.data import chat, supervised, tiny_tokenizer
from sdjax.distributed import StopSignal
from sdjax.head import chunk_size
from sdjax.metrics import MetricsWriter
from sdjax.models import decoder, from_pretrained, hf
from sdjax.models.config import ModelConfig
from sdjax.objectives.objective import ObjectiveConfig
from sdjax.optimizer import OptimizerConfig, apply_gradient, learning_rate, make_optimizer
from sdjax.optimizer import update_count as updates_so_far
from sdjax.progress import Progress
from sdjax.step import StepConfig, init_state
from sdjax.types import Array, Params, TrainState

FIELDS = (("loss/total", "loss", "{:.4f}"), ("sft/accuracy", "accuracy", "{:.3f}"))
UNROLLED = 6  # models of so few layers are not scanned: on a CPU the scan costs a fifth of the step


def run(c: ConfigDict, workdir: str, stop: StopSignal | None = None) -> Path | None:
    """Trains from the newest checkpoint of `workdir` or from the start; returns the export's path.

    None when `stop` ended the run early: its state is saved and the same command goes on.
    """
    stop = stop or StopSignal()
    config.check(c, jax.device_count())
    _check(c)
    bind_workdir(workdir, c)
    mesh = parallel.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context)
    cfg, tokenizer, state = build(c, mesh)
    read = supervised.source(c, tokenizer)
    step_fn = make_step(cfg, c, mesh)
    checkpoints = Checkpoints(workdir, c.checkpoint.keep)
    restored = checkpoints.restore(state)
    resumed = None if restored is None else int(restored.step)
    state = state if restored is None else restored
    with (
        MetricsWriter(workdir, resumed) as writer,
        Progress(c.sft.steps, start=resumed or 0, fields=FIELDS) as progress,
    ):
        for step in range((resumed or 0) + 1, c.sft.steps + 1):
            started = time.perf_counter()
            rows = supervised.batch(read, tokenizer, c.sft, step)
            state, metrics = step_fn(state, _place(rows.arrays(), mesh))
            row = {name: float(value) for name, value in metrics.items()}
            row["sft/dropped_frac"] = rows.dropped / c.sft.examples
            row["time/step_s"] = time.perf_counter() - started
            writer.write(step, row)
            progress.update(step, row)
            stopping = stop.agreed()
            if stopping or step % c.checkpoint.every == 0 or step == c.sft.steps:
                writer.flush()
                checkpoints.save(step, state)
            if stopping:
                checkpoints.close()
                progress.note(f"stopped after step {step}; the same command goes on from there")
                return None
    checkpoints.close()
    return export(c, cfg, tokenizer, state, workdir)


def _check(c: ConfigDict) -> None:
    if c.model.lora.rank:
        raise ValueError(
            f"config.model.lora.rank is {c.model.lora.rank}, but mode='sft' trains all parameters: "
            "set it to 0"
        )
    if jax.process_count() > 1:
        raise ValueError("mode='sft' runs in one process: start it on a single host")


def scratch_config(arch: ConfigDict, tokenizer: Any) -> ModelConfig:
    """A Qwen3-architecture model of the sizes in `config.sft.arch`, embeddings tied."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=len(tokenizer),
        qk_norm="head",
        tie_embeddings=True,
        max_positions=tokenizer.model_max_length,
        init_std=arch.d_model**-0.5,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
        **arch,
    )


def build(c: ConfigDict, mesh: Mesh) -> tuple[ModelConfig, Any, TrainState]:
    """Model, tokenizer and the state before the first step; 'scratch' makes fresh weights."""
    if c.sft.init == "scratch":
        tokenizer = tiny_tokenizer.load()
        cfg = scratch_config(c.sft.arch, tokenizer)
        places = decoder.param_shardings(cfg, mesh)
        init = jax.jit(functools.partial(decoder.init_params, cfg), out_shardings=places)
        params = init(jax.random.key(c.seed))
    else:
        model = from_pretrained(c.model.path, mesh)
        cfg, tokenizer, params = model.cfg, model.tokenizer, model.params
    objective = ObjectiveConfig(pg_coef=1.0, distill_coef=0.0)  # no teacher in the state
    return cfg, tokenizer, init_state(params, objective, _optimizer(c), mesh)


def _optimizer(c: ConfigDict) -> OptimizerConfig:
    fields = {k: v for k, v in c.optimizer.items() if k in OptimizerConfig.__dataclass_fields__}
    return OptimizerConfig(**fields, total_steps=c.sft.steps)


def _place(arrays: dict[str, Any], mesh: Mesh) -> dict[str, Array]:
    return jax.device_put(arrays, parallel.sharding(mesh, "B1", parallel.ACT_RULES))


def cross_entropy(
    hidden_BRD: Array, weight_VD: Array, targets_BR: Array, chunk: int
) -> tuple[Array, Array]:
    """(-log p of the targets, whether the most likely token is right), both float32 [B, R].

    Logits exist for `chunk` slots of each row at a time, and again in the backward pass.
    """
    B, R, D = hidden_BRD.shape
    pad = -R % chunk
    hidden = jnp.pad(hidden_BRD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, chunk, D)
    targets = jnp.pad(targets_BR, ((0, 0), (0, pad))).reshape(B, -1, chunk)

    @jax.checkpoint
    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_BRD, targets_BR = part
        logits_BRV = jnp.einsum(
            "brd,vd->brv",
            hidden_BRD,
            weight_VD.astype(hidden_BRD.dtype),
            preferred_element_type=jnp.float32,
        )
        logp_BRV = jax.nn.log_softmax(logits_BRV)
        nll_BR = -jnp.take_along_axis(logp_BRV, targets_BR[..., None], -1)[..., 0]
        return nll_BR, (logits_BRV.argmax(-1) == targets_BR).astype(jnp.float32)

    parts = (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
    nll, right = jax.lax.map(of_chunk, parts)
    join = lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :R]
    return join(nll), join(right)


def make_loss(cfg: ModelConfig, c: ConfigDict) -> Callable[[Params, dict], tuple[Array, dict]]:
    """loss(params, rows) -> (mean -log p over the learnt tokens of the batch, metrics)."""
    dtype, remat = StepConfig.from_config(c).compute_dtype, c.model.remat

    def loss(params: Params, rows: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        if cfg.n_layers <= UNROLLED:
            params = decoder.unstack_layers(params, cfg)
        hidden_BTD = decoder.hidden_states(
            params,
            rows["tokens"],
            rows["segment_ids"],
            rows["positions"],
            cfg,
            compute_dtype=dtype,
            remat=remat,
            attention_impl=c.model.attention,
        )
        hidden_BRD = jnp.take_along_axis(hidden_BTD, rows["index"][..., None], 1)
        B, R = rows["targets"].shape
        chunk = chunk_size(B, R, cfg.vocab_size)
        weight_VD = decoder.head_weight(params, cfg)
        nll_BR, right_BR = cross_entropy(hidden_BRD, weight_VD, rows["targets"], chunk)
        count = jnp.maximum(1, rows["mask"].sum())
        mean = lambda x_BR: jnp.where(rows["mask"], x_BR, 0.0).sum() / count
        return mean(nll_BR), {"sft/accuracy": mean(right_BR), "sft/tokens": rows["mask"].sum()}

    return loss


def make_step(
    cfg: ModelConfig, c: ConfigDict, mesh: Mesh
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """step(state, rows) -> (state, metrics): one compiled AdamW update; `state` is given up."""
    optimizer = _optimizer(c)
    adam = make_optimizer(optimizer)
    loss = make_loss(cfg, c)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, rows: dict[str, Array]):
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
        rate = learning_rate(optimizer, updates_so_far(state.opt_state))
        params, opt_state, norm, finite = apply_gradient(
            adam, optimizer.clip_norm, grad, state.opt_state, state.params
        )
        metrics |= {"loss/total": value, "optimizer/grad_norm": norm, "optimizer/lr": rate}
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped
        ), metrics

    def step(state: TrainState, rows: dict[str, Array]):
        with jax.set_mesh(mesh):
            return update(state, rows)

    return step


def export(
    c: ConfigDict, cfg: ModelConfig, tokenizer: Any, state: TrainState, workdir: str
) -> Path:
    """Writes `<workdir>/export` in the Hugging Face format and says where."""
    folder = Path(workdir) / "export"
    generation = {
        "eos_token_id": list(
            chat.end_token_ids(tokenizer, {"eos_token_id": list(cfg.eos_token_ids)})
        ),
        "pad_token_id": cfg.pad_token_id,
    }
    hf.save(str(folder), cfg, state.params, tokenizer, generation, c.checkpoint.export_dtype)
    print(f"model: {folder}")
    return folder
