"""Puts a plan together: compile, count, add up the memory, and look for settings that fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from sdjax.models import lora
from sdjax.plan import analytic, chips, hlo, programs
from sdjax.plan.roofline import Phase
from sdjax.rollout import cache as kv

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the report shows. Sizes in bytes and FLOPs are per device unless named total."""

    c: ConfigDict
    topology: chips.Topology
    mesh: dict[str, int]
    rollout_mesh: dict[str, int]
    hosts: int
    parameters: int
    spec: Any
    attention: str
    train_memory: dict[str, int]
    rollout_memory: dict[str, int]
    programs: dict[str, programs.Program]
    phases: list[Phase]
    analytic_train_flops: float
    slots: int
    slots_that_fit: int
    suggestions: list[str]

    @property
    def limit(self) -> int:
        """Bytes that a plan may use per device."""
        return int(self.c.plan.limit_frac * self.topology.chip.hbm_bytes)

    @property
    def train_bytes(self) -> int:
        """Peak of the training phase."""
        return sum(self.train_memory.values())

    @property
    def rollout_bytes(self) -> int:
        """Peak of the sampling phase."""
        return sum(self.rollout_memory.values())

    @property
    def fits(self) -> bool:
        """Whether both phases stay below the limit."""
        return max(self.train_bytes, self.rollout_bytes) <= self.limit

    @property
    def batch_seconds(self) -> float:
        """Least time of one training batch."""
        return sum(phase.total_seconds for phase in self.phases)


def study(
    c: ConfigDict,
    topology: chips.Topology,
    suggest: bool | None = None,
    done: Mapping[str, programs.Program] | None = None,
) -> Plan:
    """Compiles the run's programs for a slice and draws the conclusions.

    `done` holds programs that are known already. Raises ValueError when the run does not split over
    the slice.
    """
    s = programs.setup(c, topology)
    lower = {"train step": programs.train_step}
    if c.plan.decode:
        lower |= {"prefill": programs.prefill, "decode": programs.decode}
    done = dict(done or {})
    for name, program in lower.items():
        if name not in done:
            done[name] = programs.compile_program(name, program(s))
    state = programs.abstract_state(s)
    train_memory = _train_memory(s, state, done["train step"])
    rollout_memory = _rollout_memory(s, state, done) if c.plan.decode else {}
    plan = Plan(
        c=s.c,
        topology=topology,
        mesh=dict(s.mesh.shape),
        rollout_mesh=dict(s.rollout_mesh.shape),
        hosts=s.hosts,
        parameters=analytic.parameter_count(lora.without(s.cfg)),
        spec=s.spec,
        attention=s.c.model.attention,
        train_memory=train_memory,
        rollout_memory=rollout_memory,
        programs=done,
        phases=_phases(s, done),
        analytic_train_flops=_analytic_flops(s) / topology.devices,
        slots=s.engine.slots,
        slots_that_fit=_slots_that_fit(s, rollout_memory) if c.plan.decode else 0,
        suggestions=[],
    )
    if not plan.fits and (c.plan.suggest if suggest is None else suggest):
        return dataclasses.replace(plan, suggestions=_suggest(plan))
    return plan


def shrunk(c: ConfigDict, topology: chips.Topology) -> ConfigDict:
    """The config with mesh.fsdp as large as the slice has devices for, at most as it was."""
    c = c.copy_and_resolve_references()
    left = topology.devices // (c.mesh.tensor * c.mesh.context)
    sizes = (n for n in range(min(c.mesh.fsdp, left), 0, -1) if left % n == 0)
    c.mesh.fsdp = next(sizes, c.mesh.fsdp)
    return c


def _resident(s: programs.Setup, state: Any) -> dict[str, int]:
    """What training keeps on a device all the time."""
    sizes = {
        "parameters": programs.device_bytes(state.params) + _bytes(state.frozen),
        "optimizer": programs.device_bytes(state.opt_state),
        "teacher": _bytes(state.teacher_params),
    }
    if s.c.log.kl_to_initial or s.objective.kl_coef:
        whole = sizes["parameters"] * jnp.dtype(s.c.model.compute_dtype).itemsize // 4
        sizes["initial policy"] = whole
    return sizes


def _bytes(tree: Any) -> int:
    return 0 if tree is None else programs.device_bytes(tree)


def _train_memory(s: programs.Setup, state: Any, program: programs.Program) -> dict[str, int]:
    """Peak of the train step by kind. Gradient and logits by formula, the rest is XLA's."""
    sizes = _resident(s, state)
    sizes["batch"] = programs.device_bytes(programs.abstract_batch(s))
    known = sum(sizes.values()) - sizes.get("initial policy", 0)
    rest = max(0, program.peak_bytes - known)
    trained = programs.device_bytes(state.params)
    gradient = min(rest, trained * (2 if s.spec.micro_batches > 1 else 1))
    logits = min(rest - gradient, _logits_bytes(s))
    sizes["gradient"] = gradient
    sizes["logits chunk"] = logits
    sizes["activations and workspace"] = rest - gradient - logits
    return sizes


def _rows_per_device(s: programs.Setup) -> int:
    return -(-s.spec.micro_rows // (s.mesh.shape["data"] * s.mesh.shape["fsdp"]))


def _logits_bytes(s: programs.Setup) -> int:
    """float32 logits of student and teacher and the gradient of one chunk, on one device."""
    copies = 3 if s.objective.uses_teacher else 2
    vocab = s.cfg.vocab_size // s.mesh.shape["tensor"]
    return copies * 4 * _rows_per_device(s) * s.c.objective.chunk * vocab


def _rollout_memory(
    s: programs.Setup, state: Any, done: dict[str, programs.Program]
) -> dict[str, int]:
    """Peak of sampling: the training state stays, beside it weights, cache and work space."""
    static, weights = programs.rollout_static(s)
    sizes = _resident(s, state)
    sizes["sampler's weights"] = programs.device_bytes(weights)
    sizes["KV cache"] = s.engine.slots * _cache_bytes_per_slot(s, static)
    work = []
    for name, given in (
        ("decode", sizes["sampler's weights"] + sizes["KV cache"]),
        ("prefill", sizes["sampler's weights"]),
    ):
        work.append(max(0, done[name].peak_bytes - given))
    sizes["decode workspace"] = max(work)
    return sizes


def _cache_bytes_per_slot(s: programs.Setup, static: Any) -> int:
    """Bytes on one device per decode slot of a host, at the greatest length."""
    rows = _row_shards(s)
    shapes = static.cache.shapes(rows, s.engine.buckets(rows).lengths[-1])
    layer = programs.abstract(shapes, kv.shardings(static.cache, s.rollout_mesh))
    return static.cache.n_layers * programs.device_bytes(layer) // rows


def _row_shards(s: programs.Setup) -> int:
    return s.rollout_mesh.shape["data"] * s.rollout_mesh.shape["fsdp"]


def _slots_that_fit(s: programs.Setup, memory: dict[str, int]) -> int:
    """Slots per host that the limit leaves room for, a multiple of what rows split over."""
    static, _ = programs.rollout_static(s)
    others = sum(memory.values()) - memory["KV cache"]
    free = s.c.plan.limit_frac * s.topology.chip.hbm_bytes - others
    slots = int(max(0.0, free) // _cache_bytes_per_slot(s, static))
    return slots // _row_shards(s) * _row_shards(s)


def _phases(s: programs.Setup, done: dict[str, programs.Program]) -> list[Phase]:
    """The phases of a training batch with responses of the planned mean length."""
    c, chip = s.c, s.topology.chip
    mean = c.plan.response_len or c.sampling.max_new_tokens / 2
    responses = c.batch.prompts * c.batch.group_size
    phases = []
    if done.get("prefill") and done["prefill"].compiled:
        batch = math.prod(s.engine.buckets(_row_shards(s)).largest_prefill)
        costs = hlo.count(done["prefill"].text)
        times = c.batch.prompts / s.hosts * s.engine.max_prompt_len / batch
        phases.append(Phase.of("prefill", times, costs, chip))
    if done.get("decode") and done["decode"].compiled:
        chunk = s.engine.chunk
        costs = hlo.count(done["decode"].text, lambda depth: chunk if depth == 0 else 1.0)
        times = responses / s.hosts * mean / s.engine.slots
        phases.append(Phase.of("decode step", times, costs, chip, share=1 / chunk))
    if done["train step"].compiled:
        costs = hlo.count(done["train step"].text, _train_trips(s))
        full = c.data.max_prompt_len + c.sampling.max_new_tokens
        share = min(1.0, (c.data.max_prompt_len + mean) / full)
        times = c.batch.prompts / c.batch.mini_prompts
        phases.append(Phase.of("train step", times, costs, chip, share=share))
        scorings = int(times > 1) + int(bool(c.log.kl_to_initial or s.objective.kl_coef))
        if scorings:
            one = hlo.Costs(flops=_scoring_flops(s) / s.mesh.size)
            name = "scoring (by formula)"
            phases.append(Phase.of(name, times * scorings, one, chip, share=share))
    return phases


def _scoring_flops(s: programs.Setup) -> float:
    """Log-probabilities of one mini-batch under the old or the initial policy, all devices."""
    spec, cfg = s.spec, lora.without(s.cfg)
    one = analytic.forward_flops(cfg, spec.micro_rows, spec.row_len)
    return spec.micro_batches * (one + analytic.head_flops(cfg, spec.micro_rows, spec.slots))


def _train_trips(s: programs.Setup) -> Any:
    """Trip counts of the step's run-time loops: micro-batches outside, head chunks inside."""
    chunks = -(-s.spec.slots // s.c.objective.chunk)
    outer = [float(s.spec.micro_batches)] if s.spec.micro_batches > 1 else []
    trips = [*outer, float(chunks)]
    return lambda depth: trips[min(depth, len(trips) - 1)]


def _analytic_flops(s: programs.Setup) -> float:
    """The step's FLOPs by formula, all devices."""
    spec = s.spec
    shape = analytic.StepShape(
        spec.micro_batches, spec.micro_rows, spec.row_len, spec.teacher_row_len, spec.slots
    )
    passes = 2 if s.c.teacher.kind == "trust_region" else int(s.objective.uses_teacher)
    cfg, m = lora.without(s.cfg), s.c.model
    return analytic.train_flops(cfg, shape, m.remat, passes, m.attention)


# What may be changed when a run does not fit, nearest to the run's own settings first.
Change = tuple[str, Any]


def _train_changes(plan: Plan) -> Iterator[list[Change]]:
    """What makes the train step smaller, in the order in which one would rather try it."""
    c, devices = plan.c, plan.topology.devices
    if c.model.remat != "full":
        yield [("model.remat", "full")]
    fsdp = c.mesh.fsdp
    while 2 * fsdp * c.mesh.tensor * c.mesh.context <= devices:
        fsdp *= 2
        yield [("mesh.fsdp", fsdp)]
    if c.optimizer.state_dtype == "float32":
        yield [("mesh.fsdp", fsdp), ("optimizer.state_dtype", "bfloat16")]
    for axis in ("tensor", "context"):
        for size in (2, 4, 8):
            if c.mesh[axis] < size <= fsdp:
                yield [("mesh.fsdp", fsdp * c.mesh[axis] // size), (f"mesh.{axis}", size)]
    if c.teacher.context.max_len > 2048:
        yield [("mesh.fsdp", fsdp), ("teacher.context.max_len", c.teacher.context.max_len // 2)]


def _rollout_changes(plan: Plan) -> Iterator[list[Change]]:
    """What makes sampling smaller: fewer slots, or weights and cache split over more devices."""
    if plan.slots_that_fit:
        yield [("rollout.slots", plan.slots_that_fit)]
    for tensor in (2, 4, 8):
        if plan.rollout_mesh["tensor"] < tensor <= plan.topology.devices // plan.hosts:
            yield [("rollout.tensor", tensor)]


def _suggest(plan: Plan) -> list[str]:
    """The nearest settings that fit, found by compiling them; else the next larger slice.

    First what brings training below the limit, then, added to it, what brings sampling there.
    """
    found: list[Change] = []
    for changes_of, fits in (
        (_train_changes, lambda p: p.train_bytes <= p.limit),
        (_rollout_changes, lambda p: p.rollout_bytes <= p.limit),
    ):
        if fits(plan):
            continue
        tries = ((changes, _try(plan, changes, fits)) for changes in changes_of(plan))
        changes, better = next((pair for pair in tries if pair[1] is not None), ([], None))
        if better is None:
            return _larger(plan.topology)
        plan, found = better, found + changes
    text = " ".join(f"--config.{field}={value}" for field, value in found)
    most = max(plan.train_bytes, plan.rollout_bytes)
    return [f"{text} fits: {most / GIB:.1f} GiB per device"]


def _try(plan: Plan, changes: list[Change], fits: Callable[[Plan], bool]) -> Plan | None:
    """The plan with these changes; None when that does not fit or does not split over the slice.

    Compiles no more than it must, as minutes go by: nothing when what stays in memory is too much
    already, not the train step when only sampling changes, nor sampling when training is too large.
    """
    c = plan.c.copy_and_resolve_references()
    c.update_from_flattened_dict(dict(changes))
    done = dict(plan.programs)
    if any(not field.startswith("rollout.") for field, _ in changes):
        done = {}
    elif set(done) - {"train step"}:
        done = {"train step": done["train step"]}
    try:
        s = programs.setup(c, plan.topology)
        if sum(_resident(s, programs.abstract_state(s)).values()) > plan.limit:
            return None
        if not done:
            alone = c.copy_and_resolve_references()
            alone.plan.decode = False
            first = study(alone, plan.topology, suggest=False)
            if first.train_bytes > first.limit:
                return None
            done = first.programs
        tried = study(c, plan.topology, suggest=False, done=done)
    except ValueError:
        return None
    return tried if fits(tried) else None


def _larger(topology: chips.Topology) -> list[str]:
    """What to say when nothing fits."""
    larger = [t for t in chips.usual(topology.chip.name) if t.chips > topology.chips]
    if not larger:
        return ["no setting tried fits this slice, and there is no larger one"]
    return [f"no setting tried fits this slice; plan for {larger[0].name} ({larger[0].product})"]
