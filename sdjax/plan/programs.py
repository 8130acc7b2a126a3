"""The programs of a run on devices that are not there: train step, prefill, decode.

Everything is a ShapeDtypeStruct with a sharding, laid out as `sdjax.build` and `sdjax.rollout` lay
out the real arrays, so what XLA compiles here is what a pod would compile. Nothing is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sdjax import build, head, parallel
from sdjax import step as step_lib
from sdjax.analysis import epistemic
from sdjax.data.packing import PackingSpec
from sdjax.models import decoder, lora
from sdjax.models.config import ModelConfig
from sdjax.objectives.objective import ObjectiveConfig
from sdjax.optimizer import OptimizerConfig, make_optimizer
from sdjax.plan import chips, known
from sdjax.rollout import cache as kv
from sdjax.rollout import programs as rollout_programs
from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.table import Table
from sdjax.types import PackedBatch, PackedRows, TrainState

OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM|Used ([\d.]+)([KMGT]?) of")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Setup:
    """One run on one slice: everything that shapes its programs."""

    c: ConfigDict = dataclasses.field(hash=False)
    topology: chips.Topology
    cfg: ModelConfig
    mesh: Mesh
    rollout_mesh: Mesh
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    spec: PackingSpec
    engine: EngineConfig

    @property
    def hosts(self) -> int:
        """Processes of the run; each samples its own share of the problems."""
        return len({d.process_index for d in self.mesh.devices.flat})


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of one device, or how it failed to fit."""

    name: str
    compile_s: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    text: str
    needs_bytes: int = 0  # what the compiler asked for when it refused

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at a time: arguments, outputs not in their place, temporaries."""
        here = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes
        return max(here, self.needs_bytes)

    @property
    def compiled(self) -> bool:
        """Whether XLA found room for it at all."""
        return bool(self.text)


def devices(topology: chips.Topology) -> list[Any]:
    """The devices of a slice, described by libtpu. ValueError without libtpu or such a slice."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **topology.options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"config.plan.topology={topology.name} cannot be described ({first[:200]}): install "
            "libtpu (pip install 'sdjax[tpu]'), and use sides that whole hosts can fill"
        ) from error
    return list(found)


def setup(c: ConfigDict, topology: chips.Topology) -> Setup:
    """Meshes and settings of the run as they would be on the slice. ValueError names bad fields."""
    c = _on_tpu(c)
    found = devices(topology)
    mesh = parallel.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context, found)
    # a slice of its own: XLA cannot compile for some devices of a slice that is only described
    host = devices(topology.host)
    cfg = known.model_config(c.model.path)
    adapters = lora.from_config(c.model.lora)
    if adapters is not None:
        cfg = dataclasses.replace(cfg, lora=adapters)
    objective = ObjectiveConfig.from_config(c)
    spec = build.packing_spec(c, mesh, objective.uses_teacher)
    with jax.set_mesh(mesh):
        c.objective.chunk = head.chunk_size(
            spec.micro_rows,
            spec.slots,
            cfg.vocab_size,
            c.objective.chunk,
            head.CHUNK_BYTES_ACCELERATOR,
        )
    return Setup(
        c=c,
        topology=topology,
        cfg=cfg,
        mesh=mesh,
        rollout_mesh=build.rollout_mesh(c, host),
        objective=objective,
        optimizer=OptimizerConfig.from_config(c),
        spec=spec,
        engine=EngineConfig.from_config(c),
    )


def _on_tpu(c: ConfigDict) -> ConfigDict:
    """The config with what "auto" means on a TPU: this host's own backend must not decide."""
    c = c.copy_and_resolve_references()
    if c.model.compute_dtype == "auto":
        c.model.compute_dtype = "bfloat16"
    if c.model.attention == "auto":
        c.model.attention = "splash"
    return c


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of a tree, placed by a tree of shardings or by one for all."""
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    place = lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=s)
    return jax.tree.map(place, tree, shardings)


def abstract_params(cfg: ModelConfig, mesh: Mesh) -> Any:
    """The float32 parameters of a model on a mesh, with its adapters if it has any."""
    plain = lora.without(cfg)
    params = abstract(_shapes(decoder.param_specs(plain)), decoder.param_shardings(plain, mesh))
    if cfg.lora is None:
        return params
    specs = lora.specs(cfg)
    place = lambda spec: parallel.sharding(mesh, spec.letters)
    adapters = abstract(_shapes(specs), jax.tree.map(place, specs, is_leaf=decoder.is_spec))
    return {**params, "layers": {**params["layers"], "lora": adapters}}


def _shapes(specs: Any, dtype: Any = jnp.float32) -> Any:
    """ShapeDtypeStructs of ParamSpecs."""
    shape = lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype)
    return jax.tree.map(shape, specs, is_leaf=decoder.is_spec)


def abstract_state(s: Setup) -> TrainState:
    """The TrainState as `step.init_state` lays it out."""
    trained, frozen = lora.split(abstract_params(s.cfg, s.mesh))
    whole = parallel.replicated(s.mesh)
    places = jax.tree.map(lambda x: x.sharding, trained)
    opt_state = jax.eval_shape(make_optimizer(s.optimizer).init, trained)
    own = step_lib.has_own_teacher(s.objective, s.c.teacher.kind, frozen)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(
        step=count,
        params=trained,
        frozen=frozen,
        teacher_params=trained if own else None,
        opt_state=abstract(opt_state, step_lib.like_params(opt_state, trained, places, whole)),
        skipped=count,
    )


def abstract_batch(s: Setup) -> PackedBatch:
    """The packed mini-batch of one optimizer step, in the run's largest shape."""
    rows = parallel.sharding(s.mesh, "ABT", parallel.ACT_RULES)
    slots = parallel.sharding(s.mesh, "ABR", parallel.ACT_RULES)
    A, B = s.spec.micro_batches, s.spec.micro_rows

    def tokens(length: int) -> PackedRows | None:
        one = jax.ShapeDtypeStruct((A, B, length), jnp.int32, sharding=rows)
        return PackedRows(one, one, one) if length else None

    slot = lambda dtype: jax.ShapeDtypeStruct((A, B, s.spec.slots), dtype, sharding=slots)
    several_updates = s.c.batch.mini_prompts < s.c.batch.prompts
    return PackedBatch(
        student=tokens(s.spec.row_len),
        teacher=tokens(s.spec.teacher_row_len),
        **{n: slot(jnp.int32) for n in ("targets", "student_index", "teacher_index", "position")},
        **{n: slot(jnp.float32) for n in ("weight", "distill_weight", "advantage", "sampler_logp")},
        mask=slot(jnp.bool_),
        old_logp=slot(jnp.float32) if several_updates else None,
        ref_logp=slot(jnp.float32) if s.objective.kl_coef else None,
    )


def train_step(s: Setup) -> Callable[[], Any]:
    """Lowers the real train step."""
    config = step_lib.StepConfig.from_config(s.c, words=epistemic.WORDS)
    step = step_lib.make_train_step(s.cfg, s.objective, s.optimizer, s.mesh, config)
    words = jax.ShapeDtypeStruct(
        (s.cfg.vocab_size,), jnp.int32, sharding=parallel.replicated(s.mesh)
    )
    scalars = step_lib.StepScalars(
        knobs=s.objective.knobs(), trust_mix=s.c.teacher.trust_mix, word_of_token=words
    )
    return lambda: step.lower(abstract_state(s), abstract_batch(s), scalars)


def rollout_static(s: Setup) -> tuple[rollout_programs.Static, Any]:
    """What the engine's programs are specialised to, and its weights."""
    plain = lora.without(s.cfg)
    buckets = s.engine.buckets(_shards(s.rollout_mesh))
    specs = decoder.param_specs(plain)
    shapes = _shapes(specs, jnp.dtype(s.engine.compute_dtype))
    unstacked = jax.eval_shape(functools.partial(decoder.unstack_layers, cfg=plain), shapes)
    letters = decoder.param_letters(plain, s.rollout_mesh)
    layer = jax.tree.map(lambda text: text.removeprefix("L"), letters.pop("layers"))
    letters["layers"] = (layer,) * plain.n_layers
    places = jax.tree.map(lambda x: buckets.weight_sharding(s.rollout_mesh, x), letters)
    static = rollout_programs.Static(
        model=plain,
        cache=kv.CacheSpec.of(
            plain, s.engine.cache_dtype_name, s.engine.cache_layout, backend="tpu"
        ),
        end_tokens=(0,),
        chunk=s.engine.chunk,
        compute_dtype=s.engine.compute_dtype,
        candidates=s.engine.candidates,
        by_row=s.rollout_mesh.size == 1,
    )
    return static, abstract(unstacked, places)


def _shards(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def prefill(s: Setup) -> Callable[[], Any]:
    """Lowers the largest prefill of one host."""
    static, weights = rollout_static(s)
    shape = s.engine.buckets(_shards(s.rollout_mesh)).largest_prefill
    whole = parallel.replicated(s.rollout_mesh)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
    layers = [kv.shardings(static.cache, s.rollout_mesh)] * static.model.n_layers
    function = functools.partial(rollout_programs.prefill, static=static)

    def lower() -> Any:
        with jax.set_mesh(s.rollout_mesh):
            return jax.jit(function, out_shardings=layers).lower(weights, *[integers] * 3)

    return lower


def decode(s: Setup) -> Callable[[], Any]:
    """Lowers a chunk of decode steps of one host, with all slots at their greatest length."""
    static, weights = rollout_static(s)
    rows, length = s.engine.slots, s.engine.buckets(_shards(s.rollout_mesh)).lengths[-1]
    layer = kv.shardings(static.cache, s.rollout_mesh)
    layers = [abstract(static.cache.shapes(rows, length), layer)] * static.model.n_layers
    whole = parallel.replicated(s.rollout_mesh)
    slots = abstract(Table(rows).slots(s.engine.chunk), whole)
    stop_after = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    function = functools.partial(rollout_programs.decode, static=static)
    places = ([layer] * static.model.n_layers, whole)

    def lower() -> Any:
        jitted = jax.jit(function, donate_argnums=1, out_shardings=places)
        with jax.set_mesh(s.rollout_mesh):
            return jitted.lower(weights, layers, slots, stop_after)

    return lower


def compile_program(name: str, lower: Callable[[], Any]) -> Program:
    """Compiles a lowered program; one that does not fit comes back with what it asked for."""
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        match = OUT_OF_MEMORY.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
            raise
        number, unit = [group for group in match.groups() if group is not None][:2]
        needs = int(float(number) * UNITS[unit])
        return Program(name, time.perf_counter() - started, 0, 0, 0, 0, "", needs)
    memory = compiled.memory_analysis()
    return Program(
        name=name,
        compile_s=time.perf_counter() - started,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        text=_text(compiled),
    )


def _text(compiled: Any) -> str:
    """The optimised program. ValueError when jaxlib cannot read what libtpu wrote."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"jax {jax.__version__} cannot read the program that libtpu compiled: install the "
            "libtpu that this jax was built for (pip install --upgrade 'sdjax[tpu]')"
        ) from error


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        total += int(jnp.dtype(x.dtype).itemsize) * functools.reduce(lambda a, b: a * b, shape, 1)
    return total
