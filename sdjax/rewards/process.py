"""The parent's end of one verifier worker: its process, its pipes, its clock."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from sdjax.rewards.options import RewardConfig

ROOT = str(pathlib.Path(__file__).resolve().parents[2])
WORKER_MODULE = "sdjax.rewards.worker"
HEAVY_MODULES = {"math": "sympy,math_verify", "sdpo_released": "math_verify"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE = 4  # times the deadline that a worker may wait for a busy machine, getting no CPU
LAST_WORDS = 600  # characters of a dead worker's stderr that an error quotes


def _environment() -> dict[str, str]:
    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "2"}


class Worker:
    """One worker process; `task` is what it works on, `expires` when it must be killed."""

    def __init__(self, reward: str, config: RewardConfig, start_seconds: float) -> None:
        heavy = HEAVY_MODULES.get(reward, "") if config.fallback else ""
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER_MODULE, reward, config.to_json(), heavy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,
        )
        self.stdin = self._process.stdin.fileno()
        self.stdout = self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.task = None
        self.ready = False
        self.writing = False
        self.spent = False  # to be replaced before it gets another task
        self.served = 0
        self.expires: float | None = time.monotonic() + start_seconds
        self._outgoing = b""
        self._incoming = b""
        self._began = 0.0
        self._cpu_before = 0.0

    def become_ready(self) -> None:
        """The worker can take tasks from now on."""
        self.ready = True
        self.expires = None

    def begin(self, task, deadline_s: float) -> None:
        """Queue a task for writing and start its clock."""
        self.task = task
        text = {"id": self.served, "answer": task.answer, "gold": task.gold}
        self._outgoing += json.dumps(text).encode() + b"\n"
        # while it imports, the clock stays where `pause` put it; `resume` starts it
        if self.expires is None:
            self._start_clock(deadline_s)

    def _start_clock(self, deadline_s: float) -> None:
        self._began, self._cpu_before = time.monotonic(), self._cpu_seconds()
        self.expires = self._began + deadline_s

    def starved(self, deadline_s: float) -> bool:
        """Give an overdue worker more time if the machine hardly let it run; True if so.

        Verdicts must not depend on how busy the machine is. Bounded by PATIENCE deadlines.
        """
        if self.task is None or not self.ready:
            return False
        used = self._cpu_seconds() - self._cpu_before
        if not used <= deadline_s / 4 or time.monotonic() > self._began + PATIENCE * deadline_s:
            return False
        self.expires = time.monotonic() + deadline_s / 2
        return True

    def _cpu_seconds(self) -> float:
        """CPU time of the worker so far; nan where there is no /proc to tell."""
        try:
            with open(f"/proc/{self._process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return math.nan
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def finish(self):
        """The task that was answered; the worker is free again."""
        task, self.task = self.task, None
        self.served += 1
        self.expires = None
        return task

    def pause(self, seconds: float) -> None:
        """The worker imports a library: that is not the answer's fault."""
        self.expires = time.monotonic() + seconds

    def resume(self, deadline_s: float) -> None:
        """The import is over: a waiting task's clock starts now."""
        self.expires = None
        if self.task is not None:
            self._start_clock(deadline_s)

    def flush(self) -> bool:
        """Write without blocking; True while something is left."""
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[os.write(self.stdin, self._outgoing) :]
        except BlockingIOError:
            return True
        return False

    def read(self) -> tuple[list[dict], bool]:
        """(messages, closed): complete messages that have arrived, and whether it was the end."""
        closed = False
        try:
            while chunk := os.read(self.stdout, 1 << 16):
                self._incoming += chunk
            closed = True
        except BlockingIOError:
            pass
        *lines, self._incoming = self._incoming.split(b"\n")
        return [json.loads(line) for line in lines], closed

    def last_words(self) -> str:
        """The end of what the worker wrote to stderr."""
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - LAST_WORDS))
        return self._stderr.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """SIGKILL to the worker's whole session, then reap it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()
        self._process.wait()
