"""Samples responses: fixed decode slots, refilled from a queue, over a cache that grows in steps.

    1. prompts are prefilled in batches; the responses of one request share one prefill
    2. free slots take the next responses, without recompiling or stopping their neighbours
    3. a compiled chunk of decode steps runs on the device and comes back early when slots are free
    4. finished responses leave through `on_finish` at once, while others are still being sampled

Every shape comes from a short list of buckets (rows, cache length, prompt length), so the number of
compilations is bounded and known beforehand (`Engine.warm_up`). On several processes, every process
makes the same calls. Does not know problems, verifiers or training.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.compiled import Program
from sdjax.models import decoder, lora
from sdjax.models.config import ModelConfig
from sdjax.parallel import replicated, to_process
from sdjax.records import Completion, Request
from sdjax.rollout import cache as kv
from sdjax.rollout import memory, programs, prompts
from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.table import Response, Table
from sdjax.types import Params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Weights as the engine wants them: unstacked layers in compute precision, adapters merged."""

    params: Params


@dataclasses.dataclass
class _Prefilled:
    """A batch of prompts on the device, and the responses that still wait for a slot."""

    layers: list[kv.Layer]
    waiting: collections.deque  # of ((row, column) of its prompt in the batch, Response)


class Engine:
    """Sampling engine of one model shape; see `EngineConfig` for what can be set.

    `end_token_ids` are all the tokens that end a response; `pad_id` fills padded prompts and is
    never looked at. Slots that do not fit into the devices' memory are left out, see `memory`.
    """

    def __init__(
        self,
        model_cfg: ModelConfig,
        engine_cfg: EngineConfig,
        mesh: Mesh,
        end_token_ids: Iterable[int],
        pad_id: int = 0,
    ):
        engine_cfg = memory.fitted(model_cfg, engine_cfg, mesh)
        self.model_cfg, self.cfg, self.mesh = model_cfg, engine_cfg, mesh
        self.pad_id = pad_id
        self.ends = frozenset(int(t) for t in end_token_ids)
        self.buckets = engine_cfg.buckets(mesh.shape["data"] * mesh.shape["fsdp"])
        self.spec = kv.CacheSpec.of(model_cfg, engine_cfg.cache_dtype_name, engine_cfg.cache_layout)
        self.static = programs.Static(
            model=lora.without(model_cfg),
            cache=self.spec,
            end_tokens=tuple(sorted(self.ends)),
            chunk=engine_cfg.chunk,
            compute_dtype=engine_cfg.compute_dtype,
            candidates=engine_cfg.candidates,
            by_row=mesh.size == 1,
            output_first=mesh.devices.flat[0].platform == "cpu"
            and model_cfg.d_model * model_cfg.d_ff >= decoder.OUTPUT_FIRST_ENTRIES,
        )
        layer = kv.shardings(self.spec, mesh)
        layers, whole = [layer] * model_cfg.n_layers, replicated(mesh)
        prefill = functools.partial(programs.prefill, static=self.static)
        decode = functools.partial(programs.decode, static=self.static)
        self._prefill = Program(prefill, out_shardings=layers)
        self._decode = Program(decode, donate_argnums=1, out_shardings=(layers, whole))
        self._insert = Program(kv.insert, donate_argnums=0, out_shardings=layer)
        self._resize = Program(kv.resize, static_argnums=2, out_shardings=layer)
        self._empty = Program(self._zeros, static_argnums=(0, 1), out_shardings=layer)
        self._prepare = jax.jit(self._unstack, out_shardings=self._weight_shardings())
        self._merge = jax.jit(self._merge_and_cast)
        self._stats: dict[str, float] = collections.defaultdict(float)

    # ------------------------------------------------------------------ weights and compilation

    def prepare(self, params: Params | Prepared) -> Prepared:
        """Reshards, casts and unstacks the trainer's weights on the device.

        Give the result to `generate` to sample several times from the same weights.
        """
        if isinstance(params, Prepared):
            return params
        if jax.process_count() > 1:  # global arrays: every process takes a copy to its own devices
            params = to_process(self._merge(params), self._stacked_specs(), self.mesh)
        with jax.set_mesh(self.mesh):
            return Prepared(self._prepare(params))

    def warm_up(self, params: Params | Prepared) -> int:
        """Compiles every program the buckets allow; returns how many there are and logs each."""
        weights = self.prepare(params).params
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            batches = [self._warm_prefill(weights, shape) for shape in self.buckets.prefills]
            for rows in self.buckets.rows:
                for length in self.buckets.lengths:
                    self._warm_cache(weights, rows, length, batches)
        log.info(
            "rollout warm-up: %d programs in %.1f s",
            self.compilations,
            time.perf_counter() - started,
        )
        return self.compilations

    def _warm_prefill(self, weights, shape: tuple[int, int]) -> kv.Layer:
        """The first layer of a batch; the others need not stay in memory."""
        return self._call("prefill", weights, *(np.zeros(shape, np.int32) for _ in range(3)))[0]

    def _warm_cache(self, weights, rows: int, length: int, batches) -> None:
        layers = self._call("empty", rows, length)
        layers = [layers] + [self._empty(rows, length) for _ in range(self.spec.n_layers - 1)]
        nowhere_B = np.zeros(rows, np.int32)
        for batch in batches:
            none = nowhere_B, nowhere_B, np.zeros(rows, bool)
            layers[0] = self._call("insert", layers[0], batch, *none)
        slots = Table(rows).slots(self.cfg.chunk)
        layers, _ = self._call("decode", weights, layers, slots, np.int32(1))
        for next_rows, next_length in self.buckets.neighbours(rows, length):
            self._call("resize", layers[0], np.zeros(next_rows, np.int32), next_length)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        compiled = (self._prefill, self._decode, self._insert, self._resize, self._empty)
        return sum(program.compilations for program in compiled)

    def _call(self, name: str, *args):
        """Calls a compiled function and logs when it had to be compiled for a new shape."""
        program = getattr(self, "_" + name)
        before, started = program.compilations, time.perf_counter()
        out = program(*args)
        if program.compilations > before:
            seconds = time.perf_counter() - started
            self._stats["compile_s"] += seconds
            log.info("rollout compiled %s (no. %d) in %.1f s", name, self.compilations, seconds)
        return out

    def _merge_and_cast(self, params: Params) -> Params:
        if self.model_cfg.lora is not None:
            params = lora.merge(params, self.model_cfg)
        return jax.tree.map(lambda leaf: leaf.astype(self.cfg.compute_dtype), params)

    def _unstack(self, params: Params) -> Params:
        params = decoder.unstack_layers(self._merge_and_cast(params), self.static.model)
        if self.static.output_first:
            params["layers"] = tuple(map(decoder.output_first, params["layers"]))
        return params

    def _stacked_specs(self) -> Params:
        """PartitionSpecs of the stacked parameters on this engine's mesh."""
        place = lambda letters: self.buckets.weight_sharding(self.mesh, letters).spec
        return jax.tree.map(place, decoder.param_letters(self.static.model, self.mesh))

    def _weight_shardings(self) -> Params:
        """Rules of the parameters, whole over fsdp: a decode step must not gather its weights."""
        letters = decoder.param_letters(self.static.model, self.mesh)
        decoder.param_shardings(self.static.model, self.mesh)  # complains of what does not split
        place = functools.partial(self.buckets.weight_sharding, self.mesh)
        layer = jax.tree.map(lambda text: text.removeprefix("L"), letters.pop("layers"))
        if self.static.output_first:
            layer = decoder.output_first_letters(layer)
        letters["layers"] = (layer,) * self.static.model.n_layers
        return jax.tree.map(place, letters)

    def _zeros(self, rows: int, length: int) -> kv.Layer:
        return {n: jnp.zeros(s.shape, s.dtype) for n, s in self.spec.shapes(rows, length).items()}

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        params: Params | Prepared,
        requests: Iterable[Request | None],
        on_finish: Callable[[Completion], None] | None = None,
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
        step: int | None = None,
    ) -> list[Completion]:
        """Samples `n` responses of every request; returns them in the order of request and index.

        `on_finish` gets each response as soon as it is complete, `on_tokens(request id, index, new
        tokens)` every chunk's tokens. `requests` may be a generator: it is read when slots are
        free, and may yield None to say that nothing has arrived yet. `step` is the training step,
        named in errors. Requests whose prompt is too long are dropped or cut (`EngineConfig`), and
        counted.

        Raises ValueError for a request that can never run, FloatingPointError when logits are not
        finite.
        """
        run = _Run(self, self.prepare(params).params, iter(requests), on_finish, on_tokens, step)
        if isinstance(requests, collections.abc.Sequence):
            run.expect(sum(r.n for r in requests if r is not None))
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            done = run.loop()
        self._stats["seconds"] += time.perf_counter() - started
        return done

    def stats(self) -> dict[str, float]:
        """What the engine has done since it was built or `reset_stats` was called.

        `occupancy` is the share of slot-steps that produced a token, `tokens_per_s` counts response
        tokens over the wall time of `generate`.
        """
        out = dict(self._stats)
        for name in ("tokens", "responses", "dropped", "truncated_prompts", "seconds"):
            out.setdefault(name, 0.0)
        out["tokens_per_s"] = out["tokens"] / max(out["seconds"], 1e-9)
        out["occupancy"] = out["tokens"] / max(out.get("slot_steps", 0.0), 1.0)
        out["compilations"] = self.compilations
        return out

    def reset_stats(self) -> None:
        """Forgets the counters, not the compiled programs."""
        self._stats.clear()


class _Run:
    """One call of `generate`: the queue, the table of slots and the cache that belongs to them."""

    def __init__(self, engine: Engine, weights, requests: Iterator, on_finish, on_tokens, step):
        self.engine, self.weights, self.requests = engine, weights, requests
        self.on_finish, self.on_tokens, self.step = on_finish, on_tokens, step
        self.cfg, self.buckets, self.stats = engine.cfg, engine.buckets, engine._stats
        self.queue: collections.deque[Response] = collections.deque()
        self.batch: _Prefilled | None = None
        self.exhausted = False
        self.seen: set[int] = set()
        self.order = 0
        self.done: list[tuple[int, int, Completion]] = []
        self.table = Table(self.buckets.rows[-1])
        self.length = self.buckets.lengths[0]
        self.layers: list[kv.Layer] | None = None

    def expect(self, responses: int) -> None:
        """Starts with as many slots as there will be responses, not more."""
        self.table = Table(self.buckets.rows_for(responses))

    def loop(self) -> list[Completion]:
        """Refill, decode, book, until nothing is left."""
        engine = self.engine
        self.layers = [
            engine._call("empty", self.table.rows, self.length) for _ in range(engine.spec.n_layers)
        ]
        while True:
            self._refill()
            if not self.table.live():
                if self.exhausted and not self._pending():
                    break
                continue
            self._fit()
            self._decode()
        return [completion for *_, completion in sorted(self.done, key=lambda d: d[:2])]

    # ------------------------------------------------------------------ queue

    def _pending(self) -> bool:
        return bool(self.queue) or (self.batch is not None and bool(self.batch.waiting))

    def _read(self, wanted: int) -> None:
        """Moves requests from the caller's iterable to the queue, until `wanted` responses wait."""
        while not self.exhausted and len(self.queue) < wanted:
            request = next(self.requests, StopIteration)
            if request is StopIteration:
                self.exhausted = True
            elif request is None:
                return
            else:
                self._accept(request)

    def _accept(self, request: Request) -> None:
        if request.id in self.seen:
            raise ValueError(f"request id {request.id} was given twice: ids name random streams")
        self.seen.add(request.id)
        self._check_vocabulary(request)
        request = self.cfg.check(request)
        if request is None:
            self.stats["dropped"] += 1
            return
        if self.cfg.is_cut(request):
            cut = tuple(self.cfg.fitted(request.prompt_tokens))
            request = dataclasses.replace(request, prompt_tokens=cut)
            self.stats["truncated_prompts"] += 1
        for index in range(request.n):
            self.queue.append(Response(self.order, request, index, []))
        self.order += 1

    def _check_vocabulary(self, request: Request) -> None:
        """Ids outside the embedding would be clamped by it in silence, or not forced at all."""
        vocab = self.engine.model_cfg.vocab_size
        for token in (*request.prompt_tokens, *request.forced_prefix):
            if not 0 <= token < vocab:
                raise ValueError(
                    f"request {request.id} has token {token}, the model's vocabulary ends at "
                    f"{vocab - 1}: its tokenizer is another model's"
                )

    def _refill(self) -> None:
        """Gives every free slot the next response, prefilling prompts as needed."""
        free = self.table.free()
        while free:
            if self.batch is None or not self.batch.waiting:
                self._read(self.cfg.slots)
                if not self.queue:
                    self.batch = None
                    return
                self.batch = self._prefill()
            count = min(len(free), len(self.batch.waiting))
            taken = [self.batch.waiting.popleft() for _ in range(count)]
            self._place(free[:count], taken)
            free = free[count:]

    def _prefill(self) -> _Prefilled:
        """Prefills the first prompt of the queue and others beside it; the rest stays in order.

        Every response of a prompt shares what is prefilled, all but the prompt's last token.
        """
        started = time.perf_counter()
        queued = list({r.request.id: r.request for r in self.queue}.values())
        cached = [request.prompt_tokens[:-1] for request in queued]
        batch = prompts.pack(cached, self.buckets.prefills, self.engine.pad_id)
        place_of = {queued[i].id: place for i, place in batch.places.items()}
        taken = [response for response in self.queue if response.request.id in place_of]
        self.queue = collections.deque(r for r in self.queue if r.request.id not in place_of)
        waiting = collections.deque((place_of[r.request.id], r) for r in taken)
        layers = self.engine._call(
            "prefill", self.weights, batch.tokens_PT, batch.index_PT, batch.segment_PT
        )
        jax.block_until_ready(layers)
        self.stats["prefill_s"] += time.perf_counter() - started
        self.stats["prompt_tokens"] += sum(len(cached[i]) for i in batch.places)
        return _Prefilled(layers, waiting)

    def _place(self, slots: list[int], taken) -> None:
        """Copies prompts from the batch into slots and books their responses."""
        source_B, start_B = np.zeros((2, self.table.rows), np.int32)
        fill_B = np.zeros(self.table.rows, bool)
        for slot, ((row, column), response) in zip(slots, taken, strict=True):
            source_B[slot], start_B[slot], fill_B[slot] = row, column, True
            self.table.admit(slot, response)
        self._grow(self.table.longest() + self.cfg.chunk)
        call = self.engine._call
        for i, packed in enumerate(self.batch.layers):
            self.layers[i] = call("insert", self.layers[i], packed, source_B, start_B, fill_B)

    # ------------------------------------------------------------------ cache and decode

    def _grow(self, needed: int) -> None:
        """Lengthens the cache, bucket by bucket, until `needed` columns fit."""
        while self.length < needed:
            self._resize(list(range(self.table.rows)), self.buckets.longer(self.length))

    def _fit(self) -> None:
        """Takes the smallest bucket that holds the live rows; drops slots that will stay free."""
        if self.exhausted and not self._pending():
            live = self.table.live()
            while self.table.rows > self.buckets.rows[0]:
                rows = self.buckets.fewer(self.table.rows)
                if len(live) > rows:
                    break
                slots = (self.table.live() + self.table.free())[:rows]
                self._resize(slots, self.length)
                self.table.keep(slots)
        needed = self.table.longest() + self.cfg.chunk
        self._grow(needed)
        keep = list(range(self.table.rows))
        while self.length > self.buckets.lengths[0] and needed <= self.buckets.shorter(self.length):
            self._resize(keep, self.buckets.shorter(self.length))

    def _resize(self, slots: list[int], length: int) -> None:
        row_B = np.asarray(slots, np.int32)
        for i in range(len(self.layers)):  # one by one: never two whole caches at once
            self.layers[i] = self.engine._call("resize", self.layers[i], row_B, length)
        self.length = length

    def _decode(self) -> None:
        """One chunk on the device, then the books."""
        started = time.perf_counter()
        table = self.table
        slots = table.slots(self.cfg.chunk)
        self.layers, chunk = self.engine._call(
            "decode", self.weights, self.layers, slots, np.int32(self._stop_after())
        )
        chunk = jax.device_get(chunk)
        self._check(chunk)
        self.stats["decode_s"] += time.perf_counter() - started
        self.stats["steps"] += int(chunk.steps)
        self.stats["slot_steps"] += int(chunk.steps) * table.rows
        self.stats["tokens"] += int(chunk.count_B.sum())
        for _, response, tokens, reason in table.advance(chunk, slots.forced_IB, self.engine.ends):
            if self.on_tokens is not None:
                self.on_tokens(response.request.id, response.index, tokens)
            if reason is not None:
                completion = response.finish(reason)
                self.done.append((response.order, response.index, completion))
                self.stats["responses"] += 1
                if self.on_finish is not None:
                    self.on_finish(completion)

    def _stop_after(self) -> int:
        """How many responses may finish before the chunk returns: to refill, or to drop slots."""
        rows = self.table.rows
        if self._pending() or not self.exhausted:
            return max(1, int(rows * self.cfg.refill_fraction))
        if rows > self.buckets.rows[0]:
            return max(1, len(self.table.live()) - self.buckets.fewer(rows))
        return rows + 1

    def _check(self, chunk: programs.Chunk) -> None:
        for b in self.table.live():
            if chunk.broken_B[b] >= 0:
                response = self.table.responses[b]
                token = int(self.table.columns["generated"][b]) + int(chunk.broken_B[b])
                at = "" if self.step is None else f"training step {self.step}: "
                raise FloatingPointError(
                    f"{at}the logits of token {token} of response {response.index} to request "
                    f"{response.request.id} are not finite: the weights are broken, go back to the "
                    "checkpoint before"
                )
