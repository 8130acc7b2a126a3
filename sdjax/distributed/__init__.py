"""Many processes as one run: finding each other, failing together, stopping together.

    with distributed.session(c, workdir=workdir) as session:
        train.run(c, workdir, stop=session.stop)

Alone (no pod, no SLURM, no coordinator) a session only catches the signals. What travels between
devices is jax's business; what is here never touches parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from sdjax.distributed.cluster import METHODS, Cluster, StartupError, detect
from sdjax.distributed.collectives import (
    agree_max,
    allgather_host,
    allgather_objects,
    broadcast,
    check_same,
    global_batch,
    merge_metrics,
)
from sdjax.distributed.rollcall import EXIT_PEER_LOST, Watch, roll_call, say
from sdjax.distributed.stop import StopRequested, StopSignal

__all__ = [
    "EXIT_PEER_LOST",
    "EXIT_STOPPED",
    "METHODS",
    "Cluster",
    "Session",
    "StartupError",
    "StopRequested",
    "StopSignal",
    "agree_max",
    "allgather_host",
    "allgather_objects",
    "broadcast",
    "check_same",
    "fingerprint",
    "global_batch",
    "initialize",
    "merge_metrics",
    "session",
]

EXIT_BAD_INPUT = 2  # running it again will not help
EXIT_STOPPED = EXIT_PEER_LOST  # after SIGTERM: saved, and the same command goes on
SHUTDOWN_TIMEOUT_S = 60
# Fields in which the processes of one run must differ, or may.
OWN_FIELDS = ("distributed.process_id", "distributed.coordinator")
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclasses.dataclass
class Session:
    """A run that has started: who is in it, how to stop it, who watches it (None when alone)."""

    cluster: Cluster
    stop: StopSignal
    watch: Watch | None = None


def initialize(c: Any, **also_same: str) -> Session:
    """Finds the other processes, compares what they run, starts jax.distributed and the watch.

    `also_same` are further facts that must agree, such as the workdir.

    Must come before anything that touches jax devices. Raises StartupError, in bounded time
    (config.distributed.startup_timeout_s), when processes are missing or differ.
    """
    d = c.distributed
    cluster = detect(d.method, d.coordinator, d.num_processes, d.process_id, os.environ)
    if cluster.alone:
        return Session(cluster, StopSignal())
    peers = roll_call(cluster, fingerprint(c) | also_same, d.startup_timeout_s)
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.process_count,
        process_id=cluster.process_index,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(d.startup_timeout_s),
        # Ours speaks first, in a sentence; jax's aborts with a stack trace.
        heartbeat_timeout_seconds=int(2 * d.heartbeat_timeout_s + 10),
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    watch = Watch(cluster.process_index, peers, d.heartbeat_timeout_s, leave)
    check_same("the devices", _devices())
    return Session(cluster, StopSignal(watch), watch)


@contextlib.contextmanager
def session(c: Any, **also_same: str) -> Iterator[Session]:
    """Everything between start and end of a run, whatever ends it.

    A failure of this process is told to the others before it leaves, so that none waits in a
    collective that will never finish. A run that a signal stopped ends with SystemExit(75).
    """
    run = initialize(c, **also_same)
    run.stop.install()
    try:
        yield run
    except BaseException as error:
        if run.watch is None:
            raise
        _leave_after(error, run.watch)
    else:
        if run.watch is not None:
            run.watch.close()
            jax.distributed.shutdown()
        if run.stop.heeded:  # 0 would tell a launcher that there is nothing left to do
            sys.exit(EXIT_STOPPED)
    finally:
        run.stop.restore()


def _leave_after(error: BaseException, watch: Watch) -> None:
    """Ends this process after an exception, without waiting for a barrier that cannot be met."""
    for _ in range(20):  # a broken collective is the echo of a death that the watch is about to see
        if watch.loss or isinstance(error, StartupError | KeyboardInterrupt):
            break
        time.sleep(0.1)
    if watch.loss:
        leave(watch.loss, watch.code)
    users_mistake = isinstance(error, ValueError | FileNotFoundError)
    summary = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    watch.report_failure(summary[:500], EXIT_BAD_INPUT if users_mistake else EXIT_PEER_LOST)
    if users_mistake and not os.environ.get("SDJAX_DEBUG"):
        say(f"sdjax: {error} (SDJAX_DEBUG=1 shows the traceback)")
    else:
        traceback.print_exception(error)
    _exit(EXIT_BAD_INPUT if users_mistake else 1)


def leave(loss: str, code: int) -> None:
    """Ends this process because another is gone. Never returns."""
    advice = "; run the same command again to resume from the last checkpoint"
    say(
        f"sdjax: {loss}, so process {jax.process_index()} stops too"
        f"{advice if code == EXIT_PEER_LOST else ''}"
    )
    _exit(code)


def _exit(code: int) -> None:
    """Leaves at once: the main thread may be inside a collective that no exception can reach."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fingerprint(c: Any) -> dict[str, str]:
    """What must be the same in all processes: each config field, versions, and the code itself."""
    entries = {"python": platform.python_version(), "sdjax code": _code_hash()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            entries[package] = importlib.metadata.version(package)
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64"):
        entries[name] = os.environ.get(name, "")
    for field, value in _flatten(c.to_dict(), ""):
        if field not in OWN_FIELDS:
            entries[f"config.{field}"] = repr(value)
    return entries


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, with dotted names."""
    for name, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _code_hash() -> str:
    """Hash of this package's sources, so that a forgotten update of one host is noticed."""
    root = pathlib.Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _devices() -> str:
    """This process's devices, in words."""
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"
