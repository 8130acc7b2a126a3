"""`verify` and `check_gold`: one response at a time, through pools of one worker kept for reuse."""

from __future__ import annotations

import atexit
import os
import threading

from sdjax.records import Verdict
from sdjax.rewards.options import DEFAULT, RewardConfig
from sdjax.rewards.pool import VerifierPool

_lock = threading.Lock()
_pools: dict[tuple[int, str, RewardConfig], VerifierPool] = {}


def _pool(reward: str, config: RewardConfig) -> VerifierPool:
    """The one-worker pool of this process and config; a forked child makes its own."""
    key = (os.getpid(), reward, config)
    with _lock:
        if key not in _pools:
            _pools[key] = VerifierPool(workers=1, reward=reward, config=config)
        return _pools[key]


@atexit.register
def _close_pools() -> None:
    with _lock:
        mine = [pool for (pid, *_), pool in _pools.items() if pid == os.getpid()]
        _pools.clear()
    for pool in mine:
        pool.close()


def verify(response: str, gold: str, *, config: RewardConfig | None = None) -> Verdict:
    r"""Whether the last \boxed{...} of `response` equals `gold` as mathematics.

    Exact text and plain numbers are decided here; the rest goes to one worker process, started on
    first use and kept, so that the deadline holds whatever the answer is. Works from any thread.
    """
    return _pool("math", config or DEFAULT).submit(response, gold).result()


def check_gold(gold: str, *, config: RewardConfig | None = None) -> Verdict:
    """Whether a gold of the math reward can be read and equals itself; for data loading.

    `reason` is "number", "expression", "words" (compared as text), or why it is unusable:
    "empty_gold", "unreadable", "undefined" (no value, as 1/0), "too_big".
    """
    return _pool("gold", config or DEFAULT).submit(gold, gold).result()
