"""A verifier worker: reads one task a line on stdin, answers one verdict a line on stdout.

Started by exec (`python -m sdjax.rewards.worker`), never forked, and never imports jax. It bounds
its own memory, file size and CPU time; the deadline itself is held by the parent, which kills it.
Heavy imports (sympy, math-verify) happen while nothing is waiting and are announced, so that they
never count against a deadline.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import resource
import select
import signal
import sys

from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import get_reward

PR_SET_PDEATHSIG = 1
STACK_DEPTH = 3000
IDLE_SECONDS = 0.3  # without a task before it starts to import what it may need later
MAX_FILE_BYTES = 64 << 20  # the code reward writes solutions and tests; nothing else writes


def die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it dies."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        pass  # not Linux: the worker still ends when its stdin closes


def limit_resources(memory_mb: int) -> None:
    """Address space, core dumps and file size; CPU time is bounded per task."""
    for kind, value in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, hard))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise
            # macOS refuses to bound the address space; the deadline still holds there


def allow_cpu(seconds: float) -> None:
    """Lets this process use so much more CPU time: a last resort should the parent be gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


class Channel:
    """Line-wise JSON over the pipes to the parent; stray prints go to stderr instead."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._in = sys.stdin.buffer

    def send(self, **message) -> None:
        """Writes one message as a line of JSON, whole."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._out, data) :]

    def receive(self) -> dict | None:
        """The next message, or None when the other end has closed."""
        line = self._in.readline()
        return json.loads(line) if line else None

    def idle(self, seconds: float) -> bool:
        """Whether no task comes for so long (readline leaves none behind: one at a time)."""
        return not select.select([self._in], [], [], seconds)[0]


class Loader:
    """Imports modules that some tasks need, telling the parent to stop its clock meanwhile."""

    def __init__(self, channel: Channel, modules: tuple[str, ...]) -> None:
        self._channel = channel
        self._modules = list(modules)

    @property
    def pending(self) -> bool:
        """Whether anything is left to import."""
        return bool(self._modules)

    def load_next(self) -> None:
        """Import one more module."""
        self._channel.send(event="loading")
        importlib.import_module(self._modules.pop(0))
        self._channel.send(event="loaded")

    def load_all(self) -> None:
        """Import all of them now."""
        while self.pending:
            self.load_next()


PRELOAD: list[Loader] = []


def need_heavy_imports() -> None:
    """Called by a judge before it uses sympy or math-verify; free outside a worker."""
    for loader in PRELOAD:
        loader.load_all()


def answer(task: dict, judge, config: RewardConfig) -> dict:
    """One verdict as a message; errors are verdicts too, so that a worker survives them."""
    try:
        verdict = judge(task["answer"], task["gold"], config)
        return {"verdict": dataclasses.asdict(verdict)}
    except MemoryError:
        return {"error": "memory"}
    except RecursionError:
        return {"error": "recursion"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main(argv: list[str]) -> None:
    """`worker.py REWARD CONFIG_JSON MODULES`: serves until stdin closes."""
    die_with_parent()
    name, config_json, modules = argv
    config = RewardConfig.from_json(config_json)
    channel = Channel()
    limit_resources(config.memory_mb)
    sys.setrecursionlimit(STACK_DEPTH)
    reward = get_reward(name)
    # run as __main__, but judges import this module by its name: share the loader with that one
    loader = Loader(channel, tuple(m for m in modules.split(",") if m))
    importlib.import_module("sdjax.rewards.worker").PRELOAD.append(loader)
    channel.send(event="ready")
    while True:
        while loader.pending and channel.idle(IDLE_SECONDS):
            loader.load_next()
        task = channel.receive()
        if task is None:
            return
        allow_cpu(config.deadline_s + 60)
        message = answer(task, reward.judge, config)
        channel.send(id=task["id"], **message)
        if message.get("error") == "memory":
            return


if __name__ == "__main__":
    main(sys.argv[1:])
