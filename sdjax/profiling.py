"""Looking inside a run: xprof traces of chosen steps, program dumps, and the compilation cache.

    --config.profile.steps=10:13    traces training batches 10, 11 and 12 (view: xprof --logdir
                                    <workdir>/profile, or TensorBoard with its profile plugin)
    --config.profile.hlo=True       writes every compiled program's text to <workdir>/hlo

The compilation cache in <workdir>/xla_cache is on by default: a resumed run starts without
compiling again. Only process 0's host is traced; all devices of that host are in its trace.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

MIN_COMPILE_S = 1.0  # programs that compile faster are not worth a file


def steps(text: str) -> range:
    """The training batches that "10:13" names: 10, 11 and 12. "10" is one batch, "" none."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None or (match[2] and int(match[2]) <= int(match[1])):
        raise ValueError(
            f"config.profile.steps={text!r} is not a range of steps: write first:end, such as 10:13"
        )
    first = int(match[1])
    return range(first, int(match[2]) if match[2] else first + 1)


def prepare(c: Any, workdir: str) -> None:
    """Switches on the compilation cache and the dumps. Must come before jax touches a device."""
    steps(c.profile.steps)
    folder = c.profile.compilation_cache
    if folder:
        path = epath.Path(workdir) / "xla_cache" if folder == "auto" else epath.Path(folder)
        jax.config.update("jax_compilation_cache_dir", os.fspath(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
    if c.profile.hlo:
        if "://" in str(workdir):
            raise ValueError(
                f"config.profile.hlo writes to local disks only, but --workdir is {workdir}: set "
                "XLA_FLAGS=--xla_dump_to=FOLDER instead"
            )
        flags = os.environ.get("XLA_FLAGS", "")
        dump = f"--xla_dump_to={os.path.join(os.path.abspath(workdir), 'hlo')}"
        os.environ["XLA_FLAGS"] = f"{flags} {dump} --xla_dump_hlo_as_text".strip()


class Tracer:
    """Starts the profiler before the first step asked for and stops it after the last.

    Beside the trace goes memory.prof, what the devices held at its end (view: pprof).
    """

    def __init__(self, c: Any, workdir: str):
        self._steps = steps(c.profile.steps) if jax.process_index() == 0 else range(0)
        self._folder = epath.Path(workdir) / "profile"
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps one training batch; an exception ends the trace, so that what led to it is kept."""
        if number in self._steps and not self._running:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
        except BaseException:
            self._stop()
            raise
        if self._running and number + 1 not in self._steps:
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        (self._folder / "memory.prof").write_bytes(jax.profiler.device_memory_profile())
