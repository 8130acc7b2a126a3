"""Saving and resuming exactly: a thin wrapper over orbax, and the record of what a workdir ran.

A checkpoint holds the whole TrainState, leaf by leaf under its path, so that a change of container
types does not break old checkpoints and a wrong leaf is reported by name. Saving is asynchronous;
an unreadable checkpoint is named and the one before it is used. Beside the arrays lies a checksum
of each, since the storage format notices a missing piece but not a changed one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from sdjax import distributed
from sdjax.types import Array, TrainState

log = logging.getLogger(__name__)
PRESERVE = ocp.training.preservation_policies
STATE, METRICS = "state", "metrics"  # the saver's names for what it keeps of a step
CHECKSUMS = "checksums"  # entry of a checkpoint's metadata
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _leaves(state: TrainState) -> dict[str, Any]:
    """The state's arrays keyed by their path, e.g. ".params['layers']['w_q']".

    Without what is not trained: under LoRA that is the whole base model, which the next start loads
    from its own files.
    """
    trained = state.replace(frozen=None)
    paths = jax.tree_util.tree_leaves_with_path(trained)
    return {jax.tree_util.keystr(path): x for path, x in paths}


def _absolute(folder: str | Path) -> epath.Path:
    """The folder as the saver wants it: absolute, unless it is a URL."""
    text = str(folder)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def checksums(leaves: Mapping[str, Array]) -> dict[str, int]:
    """A number for each array, the same on every mesh, that any single changed bit changes.

    The sum, modulo 2^32, of all elements' bits times odd weights that differ by position.
    Collective.
    """
    return dict(zip(leaves, map(int, jax.device_get(_sums(tuple(leaves.values())))), strict=True))


@jax.jit
def _sums(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(map(_weighted_sum, arrays))


def _weighted_sum(x: Array) -> Array:
    """uint32 sum over x; integers, so that no order of summation changes it."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size) + step
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


class Checkpoints:
    """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

    Keeps the newest `keep` and, if `best_metric` is named, the one with its highest value.
    """

    def __init__(self, workdir: str | Path, keep: int, best_metric: str = ""):
        self.directory = _absolute(workdir) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep, self._best_metric = keep, best_metric
        self._pending: Any = None
        self._saving = 0
        self._unreadable: list[int] = []
        try:
            self._saver = self._open()
        except Exception:  # one checkpoint's own description is damaged, and hides all the others
            self._set_damaged_aside()
            self._saver = self._open()

    def _set_damaged_aside(self) -> None:
        """Renames the checkpoints that cannot even be described to <step>.damaged."""
        wrong = {}
        for folder in sorted(self.directory.iterdir()):
            if not folder.name.isdigit():
                continue
            try:
                with _reading_alone():
                    ocp.metadata(folder, checkpointable_name=STATE)
                if (folder / METRICS).exists():
                    json.loads((folder / METRICS / METRICS).read_text())
            except Exception as error:
                wrong[folder.name] = _first_line(error)
        for name in distributed.broadcast(wrong):
            if jax.process_index() == 0:
                log.warning(
                    "checkpoint %s in %s cannot be read (%s): it is %s.damaged now",
                    *(name, self.directory, wrong[name], name),
                )
                (self.directory / name).rename(self.directory / f"{name}.damaged")
        distributed.broadcast(None)  # none goes on before process 0 has renamed them

    def _open(self) -> ocp.training.Checkpointer:
        """A saver over the folder; what a broken save left behind is removed."""
        policies: list[Any] = [PRESERVE.LatestN(self._keep)]
        if self._best_metric:
            policies.append(
                PRESERVE.BestN(
                    get_metric_fn=lambda metrics: metrics[self._best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=PRESERVE.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return [c.step for c in self._saver.checkpoints]

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None = None) -> None:
        """Starts saving `state` under `step`; a failure of the previous save is logged, not raised.

        A full disk must not end a run that could still finish, nor touch older checkpoints.
        """
        self.wait()
        if step in self.steps() and step not in self._unreadable:
            return
        best = {k: v for k, v in (metrics or {}).items() if k == self._best_metric} or None
        leaves = _leaves(state)
        about = {CHECKSUMS: checksums(leaves)}
        error = None
        try:
            self._drop_unreadable()
            self._pending = self._saver.save_async(
                step, leaves, metrics=best, custom_metadata=about
            )
        except Exception as failure:  # each storage has its own, and none may end the run
            error = failure
        self._saving = step
        self._settle(error)

    def _drop_unreadable(self) -> None:
        """Deletes what `restore` passed over: it would count among the newest and displace a good
        one. Only now, when the run has gone on from an older state."""
        while self._unreadable:
            self._saver.delete(self._unreadable.pop())

    def wait(self) -> None:
        """Blocks until the save under way is on disk, and logs if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = None
        try:
            pending.result()
        except Exception as failure:  # as above; it may come from the saver's own thread
            error = failure
        self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        """Logs a failed save and starts over, in all processes if it failed in one of them.

        A saver that has failed once repeats its error at every later call.
        """
        if error is not None:
            log.error(
                "could not save the checkpoint of step %d in %s (%s): the run goes on, older "
                "checkpoints are untouched; free some space or choose another --workdir",
                self._saving,
                self.directory,
                _first_line(error),
            )
        if any(distributed.allgather_objects(error is not None)):
            self._pending = None
            with contextlib.suppress(Exception):  # the same error once more
                self._saver.close()
            self._saver = self._open()

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The newest readable state (or that of `step`), laid out like `like`; None without any.

        `like` holds arrays or ShapeDtypeStructs with shardings; another mesh than the one that
        saved is fine. `frozen` is that of `like`. Raises ValueError when checkpoints exist and none
        can be read.
        """
        candidates = [step] if step is not None else self.steps()[::-1]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _leaves(like)
        )
        for candidate in candidates:
            leaves, wrong = self._load(candidate, abstract)
            if wrong:
                log.warning(
                    "checkpoint %s in %s cannot be read (%s): trying the one before it",
                    candidate,
                    self.directory,
                    wrong,
                )
                self._unreadable.append(candidate)
                continue
            paths, treedef = jax.tree_util.tree_flatten_with_path(like.replace(frozen=None))
            state = treedef.unflatten([leaves[jax.tree_util.keystr(path)] for path, _ in paths])
            return state.replace(frozen=like.frozen)
        if candidates:
            raise ValueError(
                f"none of the checkpoints {candidates} in {self.directory} can be read: move the "
                "folder away to start afresh"
            )
        return None

    def _load(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Array], str]:
        """(arrays, what is wrong with them); all processes find the same.

        Each process reads its own part without waiting for the others: one that cannot read would
        leave them at a barrier.
        """
        leaves, expected, wrong = {}, {}, ""
        try:
            with _reading_alone():
                folder = self.directory / str(step)
                leaves = ocp.load(folder, abstract, checkpointable_name=STATE)
                about = ocp.metadata(folder, checkpointable_name=STATE).custom_metadata or {}
                expected = dict(about.get(CHECKSUMS, {}))
        except Exception as error:  # whatever a damaged file raises, the one before may do
            wrong = _first_line(error)
        wrong = next(filter(None, distributed.allgather_objects(wrong)), "")
        if wrong or not expected:
            return leaves, wrong
        found = checksums(leaves)
        changed = [path for path in found if found[path] != expected.get(path)]
        return leaves, f"{', '.join(changed[:3])} is not what was saved" if changed else ""

    def close(self) -> None:
        """Finishes the save under way and releases the folder."""
        self.wait()
        self._saver.close()


def _reading_alone() -> ocp.Context:
    """For a process that reads without waiting for the others."""
    context = ocp.Context()
    if jax.process_count() > 1:
        me = jax.process_index()
        context.multiprocessing.primary_host = me
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.barrier_sync_key_prefix = f"process{me}"
    return context


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


# Fields that may differ between a run and its continuation: they do not change the numbers.
_FREE_FIELDS = ("mesh", "log", "profile", "distributed", "checkpoint", "plan", "rollout", "reward")


def bind_workdir(workdir: str | Path, c: ConfigDict) -> None:
    """Writes config.json, or checks that the folder belongs to the same run.

    Raises ValueError naming the fields that differ, since resuming under another config would mix
    two experiments in one folder.
    """
    path = epath.Path(workdir) / "config.json"
    now = json.loads(c.to_json_best_effort())
    if path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"config.{name}"
            for name in sorted(_differences(before, now))
            if name.split(".")[0] not in _FREE_FIELDS
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other values of {', '.join(changed[:5])}"
                f"{' and more' if len(changed) > 5 else ''}: choose another --workdir, or restore "
                "the values to resume it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1, sort_keys=True))


def _differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = a.keys() | b.keys()
        return {
            path
            for name in names
            for path in _differences(
                a.get(name), b.get(name), f"{prefix}.{name}" if prefix else name
            )
        }
    return set() if a == b else {prefix}
