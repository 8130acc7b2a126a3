"""Saving and resuming exactly: a thin wrapper over orbax, and the record of what a workdir ran.

A checkpoint holds the whole TrainState, leaf by leaf under its path, so that a change of container
types does not break old checkpoints and a wrong leaf is reported by name. Saving is asynchronous;
an unreadable checkpoint is named and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from sdjax.types import TrainState

log = logging.getLogger(__name__)
PRESERVE = ocp.training.preservation_policies


def _leaves(state: TrainState) -> dict[str, Any]:
    """The state's arrays keyed by their path, e.g. ".params['layers']['w_q']"."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _absolute(folder: str | Path) -> epath.Path:
    """The folder as the saver wants it: absolute, unless it is a URL."""
    text = str(folder)
    return epath.Path(text if "://" in text else os.path.abspath(text))


class Checkpoints:
    """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

    Keeps the newest `keep` and, if `best_metric` is named, the one with its highest value.
    """

    def __init__(self, workdir: str | Path, keep: int, best_metric: str = ""):
        self.directory = _absolute(workdir) / "checkpoints"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._best_metric = best_metric
        self._pending: Any = None
        policies: list[Any] = [PRESERVE.LatestN(keep)]
        if best_metric:
            policies.append(
                PRESERVE.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._saver = ocp.training.Checkpointer(
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
        if step in self.steps():
            return
        best = {k: v for k, v in (metrics or {}).items() if k == self._best_metric} or None
        try:
            self._pending = self._saver.save_async(step, _leaves(state), metrics=best)
        except OSError as error:
            self._report(step, error)

    def wait(self) -> None:
        """Blocks until the save under way is on disk, and logs if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            self._report(None, error)

    def _report(self, step: int | None, error: Exception) -> None:
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        log.error(
            "could not save %s in %s (%s): the run goes on, older checkpoints are untouched; "
            "free some space or choose another --workdir",
            what,
            self.directory,
            str(error).splitlines()[0][:300],
        )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState | None:
        """The newest readable state (or that of `step`), laid out like `like`; None without any.

        `like` holds arrays or ShapeDtypeStructs with shardings; another mesh than the one that
        saved is fine. Raises ValueError when checkpoints exist and none can be read.
        """
        candidates = [step] if step is not None else self.steps()[::-1]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _leaves(like)
        )
        for candidate in candidates:
            try:
                leaves = self._saver.load(candidate, abstract)
            except Exception as error:  # whatever a damaged file raises, the one before may do
                log.warning(
                    "checkpoint %s in %s cannot be read (%s): trying the one before it",
                    candidate,
                    self.directory,
                    str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
                )
                continue
            paths, treedef = jax.tree_util.tree_flatten_with_path(like)
            return treedef.unflatten([leaves[jax.tree_util.keystr(path)] for path, _ in paths])
        if candidates:
            raise ValueError(
                f"none of the checkpoints {candidates} in {self.directory} can be read: move the "
                "folder away to start afresh"
            )
        return None

    def close(self) -> None:
        """Finishes the save under way and releases the folder."""
        self.wait()
        self._saver.close()


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
