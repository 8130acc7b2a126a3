"""Runs a model's Python program in a process of its own that can do nothing but compute.

The process (`sandbox_child.py`) gives up network, new processes, signals and writing outside its
temporary folder before it touches the program, and has limits on memory, CPU time and output. The
parent keeps the wall clock and kills the whole session. If the kernel refuses the lock-down, the
program is not run.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

CHILD = str(pathlib.Path(__file__).with_name("sandbox_child.py"))
NO_SANDBOX = 97  # exit status of a child that could not lock itself in
MAX_OUTPUT = 4 << 20  # bytes of stdout that are read back


class Outcome(NamedTuple):
    """`error` is "" for a clean end; `output` is stdout, or the end of the error's text."""

    error: str
    output: str
    value: Any = None


def run_program(program: str, stdin: str, seconds: float, memory_mb: int) -> Outcome:
    """Run a program that reads stdin and prints."""
    return _run(program, {"mode": "stdin"}, stdin, seconds, memory_mb)


def call_function(
    program: str, name: str, arguments: list, seconds: float, memory_mb: int
) -> Outcome:
    """Call `name` (or `Solution().name`) of a program; `value` is what it returned, as JSON."""
    task = {"mode": "call", "name": name, "arguments": arguments}
    return _run(program, task, "", seconds, memory_mb)


def _run(program: str, task: dict, stdin: str, seconds: float, memory_mb: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="sdjax-code-") as folder:
        place = pathlib.Path(folder)
        place.joinpath("program.py").write_text(program, encoding="utf-8", errors="replace")
        place.joinpath("stdin").write_text(stdin, encoding="utf-8", errors="replace")
        place.joinpath("task.json").write_text(json.dumps(task))
        status = _wait(place, seconds, memory_mb)
        return _outcome(status, task["mode"], place)


def _wait(place: pathlib.Path, seconds: float, memory_mb: int) -> int | None:
    """Exit status, or None when the time ran out."""
    command = [sys.executable, "-I", CHILD, str(max(1, round(seconds + 0.5))), str(memory_mb)]
    with (
        open(place / "stdin", "rb") as stdin,
        open(place / "stdout", "wb") as stdout,
        open(place / "stderr", "wb") as stderr,
    ):
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=place,
            env={"PATH": os.defpath, "HOME": str(place), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def _outcome(status: int | None, mode: str, place: pathlib.Path) -> Outcome:
    complaint = _tail(place / "stderr")
    if status is None or status == -signal.SIGXCPU:
        return Outcome("timeout", "The program did not finish in time.")
    if status == NO_SANDBOX:
        return Outcome("no_sandbox", complaint)
    if status != 0:
        return Outcome("runtime_error", complaint or f"exit status {status}")
    if mode == "stdin":
        with open(place / "stdout", "rb") as file:
            return Outcome("", file.read(MAX_OUTPUT).decode(errors="replace"))
    try:
        with open(place / "result.json", "rb") as file:
            return Outcome("", "", json.loads(file.read(MAX_OUTPUT)))
    except (OSError, ValueError, RecursionError):
        return Outcome("runtime_error", "the call returned nothing that JSON can hold")


def _tail(path: pathlib.Path, size: int = 2000) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace").strip()
