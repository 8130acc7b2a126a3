"""A jitted function that knows how often it was compiled: the count that every run reports."""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"
_here = threading.local()  # .names: what this thread has compiled inside the Program being called


def _note(event: str, _: float, **details: Any) -> None:
    names = getattr(_here, "names", None)
    if event == _COMPILED and names is not None:
        names.append(details.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(_note)


class Program:
    """`jax.jit(function, **options)` with `compilations`, the number of programs built by calls.

    Counted by jax's own events, so a second program for the same shapes in other places counts,
    and small programs that tracing compiles on the way do not.
    """

    def __init__(self, function: Any, **options: Any):
        # a partial is a new function to jax: two Programs never share what one of them compiled
        self._jitted = jax.jit(functools.partial(function), **options)
        self._name = f"jit({self._jitted.__name__})"
        self.lower = self._jitted.lower
        self.compilations = 0

    def __call__(self, *args: Any) -> Any:
        outer, _here.names = getattr(_here, "names", None), []
        try:
            return self._jitted(*args)
        finally:
            self.compilations += _here.names.count(self._name)
            _here.names = outer
