"""SIGTERM and Ctrl-C as a flag that all processes of a run see.

A signal only sets the flag; the training loop asks at safe points, and gives up a batch that is
still being sampled. The second Ctrl-C interrupts at once, for people who mean it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.distributed.rollcall import Watch, say


class StopRequested(Exception):
    """The batch was given up before its first update, because the run is to stop."""


class StopSignal:
    """Whether the run was asked to stop, by a signal to any of its processes.

    `requested` is this process's present knowledge, cheap enough to ask between decode chunks;
    processes may see it at different moments. `agreed()` is a collective: all processes call it at
    the same point of their programs and all get the same answer.
    """

    def __init__(self, watch: Watch | None = None):
        self._watch = watch
        self._flag = watch.stop_asked if watch else threading.Event()
        self._previous: dict[int, object] = {}
        self.reason = ""
        self.heeded = False  # whether the run has been told to stop, and so ends unfinished

    @property
    def requested(self) -> bool:
        """Whether this process knows of a wish to stop."""
        return self._flag.is_set()

    def request(self, reason: str) -> None:
        """Asks all processes to stop at their next safe point."""
        self.reason = self.reason or reason
        if self._watch:
            self._watch.ask_stop()
        self._flag.set()

    def agreed(self) -> bool:
        """Whether any process wants to stop; the same answer in all of them. Collective."""
        if jax.process_count() == 1:
            self.heeded = self.requested
        else:
            flags = multihost_utils.process_allgather(np.int32(self.requested))
            self.heeded = bool(np.any(flags))
        return self.heeded

    def interrupt(self, *_: object) -> None:
        """Raises StopRequested when this process knows of a wish to stop: a callback for sampling.

        Every process then asks `agreed`, wherever its own sampling ended.
        """
        if self.requested:
            raise StopRequested

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT; possible in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        say(f"sdjax: {name} received: saving and stopping at the next safe point")
        # The watch's lock may be held by the interrupted code, so another thread sends.
        threading.Thread(target=self.request, args=(name,), daemon=True).start()
