"""Worker processes that judge answers under a deadline and a memory limit.

One manager thread per pool starts the workers, hands each one task at a time, and kills a worker
that overruns its deadline; that item gets reason "timeout" (or "crash" where the worker died) and
no other item notices. Nothing here uses signals, multiprocessing or fork, so a pool works from any
thread and inside a process that runs jax. Verdicts do not depend on the number of workers.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import os
import selectors
import threading
import time

from sdjax.records import Verdict
from sdjax.rewards.options import DEFAULT, RewardConfig
from sdjax.rewards.process import Worker
from sdjax.rewards.registry import get_reward

log = logging.getLogger(__name__)

CACHE_ENTRIES = 1 << 16
MAX_FAILED_STARTS = 3
START_SECONDS = 120.0
IMPORT_SECONDS = 120.0


@dataclasses.dataclass(eq=False)
class _Task:
    answer: str
    gold: str
    futures: list[concurrent.futures.Future]


class VerifierPool:
    """Scores responses in `workers` processes; use as a context manager or call `close`.

    `reward` is a name for `sdjax.rewards.get_reward`. `deadline_s` counts seconds of work on one
    answer, without start-up of the worker; one that the busy machine gave no CPU gets more, up to
    four deadlines. Verdicts are cached by (answer, gold).
    """

    def __init__(
        self,
        workers: int = 2,
        reward: str = "math",
        deadline_s: float | None = None,
        memory_mb: int | None = None,
        recycle_after: int = 1000,
        config: RewardConfig = DEFAULT,
    ) -> None:
        if workers < 1:
            raise ValueError(f"reward.workers={workers} must be at least 1.")
        changes = {"deadline_s": deadline_s, "memory_mb": memory_mb}
        self.config = dataclasses.replace(
            config, **{name: value for name, value in changes.items() if value is not None}
        )
        self._reward_name = reward
        self._reward = get_reward(reward)
        self._wanted = workers
        self._recycle_after = recycle_after
        self._lock = threading.Lock()
        self._queue: collections.deque[_Task] = collections.deque()
        self._in_flight: dict[tuple[str, str], _Task] = {}
        self._cache: collections.OrderedDict[tuple[str, str], Verdict] = collections.OrderedDict()
        self._counts: collections.Counter[str] = collections.Counter()
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)

    def __enter__(self) -> VerifierPool:
        self.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers now (they load in the background); `submit` does it otherwise."""
        with self._lock:
            if self._closing:
                raise RuntimeError("this VerifierPool is closed: make a new one.")
            if self._thread is None and not self._reward.inline:
                self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
                self._thread.start()

    def submit(self, response: str, gold: str) -> concurrent.futures.Future[Verdict]:
        """A future for the verdict; extraction and exact matches are answered at once."""
        future: concurrent.futures.Future[Verdict] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # a verdict that is asked for cannot be cancelled
        found = self._reward.extract(response, gold, self.config)
        if not isinstance(found, Verdict) and self._reward.inline:
            found = self._reward.judge(found, gold, self.config)
        if isinstance(found, Verdict):
            with self._lock:
                self._counts["direct"] += 1
                self._count(found)
            future.set_result(found)
            return future
        self._enqueue(found, gold, future)
        return future

    def score(self, responses: list[str], golds: list[str]) -> list[Verdict]:
        """Verdicts in the order of the responses."""
        if len(responses) != len(golds):
            raise ValueError(f"{len(responses)} responses but {len(golds)} golds were given.")
        futures = [self.submit(r, g) for r, g in zip(responses, golds, strict=True)]
        return [future.result() for future in futures]

    def stats(self) -> dict[str, int]:
        """Counts since the start.

        direct (no worker needed), judged (tasks of workers), cache_hits, correct, timeout, crash,
        error, and reason/... of every verdict given.
        """
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Kill the workers; futures that are not done fail with RuntimeError."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # What follows belongs to the manager thread, except _enqueue and _wake.

    def _enqueue(self, answer: str, gold: str, future: concurrent.futures.Future) -> None:
        key = (answer, gold)
        with self._lock:
            if (verdict := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                self._counts["cache_hits"] += 1
                self._count(verdict)
            elif (task := self._in_flight.get(key)) is not None:
                task.futures.append(future)
                self._counts["cache_hits"] += 1
            else:
                task = self._in_flight[key] = _Task(answer, gold, [future])
                self._queue.append(task)
        if verdict is not None:
            future.set_result(verdict)
            return
        self.start()
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full: the manager is awake anyway

    def _count(self, verdict: Verdict) -> None:
        self._counts["correct"] += verdict.correct
        self._counts["reason/" + verdict.reason] += 1

    def _run(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        try:
            while not self._closing:
                self._dispatch()
                for key, events in self._selector.select(self._patience()):
                    if key.data is None:
                        self._drain_wake_pipe()
                    else:
                        self._serve(key.data, events)
                self._enforce_deadlines()
        except Exception as error:
            log.exception("the verifier pool stopped")
            self._fail_all(error)
        finally:
            for worker in list(self._workers):
                self._remove(worker)
            self._selector.close()
            self._fail_all(RuntimeError("the verifier pool was closed before this verdict."))

    def _drain_wake_pipe(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass

    def _patience(self) -> float | None:
        times = [w.expires for w in self._workers if w.expires is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _dispatch(self) -> None:
        """Keep the wanted number of workers alive and every idle one busy."""
        while len(self._workers) < self._wanted:
            self._add_worker()
        with self._lock:
            for worker in self._workers:
                if worker.ready and worker.task is None and self._queue:
                    worker.begin(self._queue.popleft(), self.config.deadline_s)
        for worker in self._workers:
            self._pump(worker)

    def _add_worker(self) -> None:
        worker = Worker(self._reward_name, self.config, START_SECONDS)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker: Worker) -> None:
        self._selector.unregister(worker.stdout)
        if worker.writing:
            self._selector.unregister(worker.stdin)
        worker.kill()
        self._workers.remove(worker)

    def _pump(self, worker: Worker) -> None:
        """Write what a worker's pipe takes; watch the pipe while something is left."""
        try:
            left = worker.flush()
        except BrokenPipeError:
            return  # its stdout closes too and tells us
        if left and not worker.writing:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif not left and worker.writing:
            self._selector.unregister(worker.stdin)
        worker.writing = left

    def _serve(self, worker: Worker, events: int) -> None:
        if worker not in self._workers:
            return  # removed by an earlier event of the same round
        if events & selectors.EVENT_WRITE:
            self._pump(worker)
        if not events & selectors.EVENT_READ:
            return
        messages, closed = worker.read()
        for message in messages:
            self._handle(worker, message)
        if closed:
            self._bury(worker)
        elif worker.spent or (worker.task is None and worker.served >= self._recycle_after):
            self._remove(worker)

    def _handle(self, worker: Worker, message: dict) -> None:
        event = message.get("event")
        if event == "ready":
            self._failed_starts = 0
            worker.become_ready()
        elif event == "loading":
            worker.pause(IMPORT_SECONDS)
        elif event == "loaded":
            worker.resume(self.config.deadline_s)
        elif worker.task is not None:
            task = worker.finish()
            if "verdict" in message:
                self._resolve(task, Verdict(**message["verdict"]))
            else:
                worker.spent = message["error"] == "memory"  # it ends itself: give it no more work
                self._note_error(message["error"])
                self._resolve(task, Verdict(False, task.answer, "error"))

    def _note_error(self, error: str) -> None:
        first = not self._counts["error"]
        self._counts["error"] += 1
        if first:
            log.warning("reward %s raised %s (counted from now on)", self._reward_name, error)

    def _bury(self, worker: Worker) -> None:
        """A worker ended by itself: its item, if any, is a crash; a failed start is counted."""
        task, was_ready, last_words = worker.task, worker.ready, worker.last_words()
        self._remove(worker)
        if task is not None:
            self._counts["crash"] += 1
            self._resolve(task, Verdict(False, task.answer, "crash"))
        elif not was_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(f"verifier workers cannot start: {last_words or 'no output'}")

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if w.expires is not None and w.expires <= now]:
            if worker.starved(self.config.deadline_s):
                continue
            task, was_ready = worker.task, worker.ready
            self._remove(worker)
            if task is not None:
                self._counts["timeout"] += 1
                self._resolve(task, Verdict(False, task.answer, "timeout"))
            elif not was_ready:
                raise RuntimeError(f"a verifier worker did not start within {START_SECONDS:.0f} s.")

    def _resolve(self, task: _Task, verdict: Verdict) -> None:
        key = (task.answer, task.gold)
        with self._lock:
            self._in_flight.pop(key, None)
            self._cache[key] = verdict
            if len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
            self._counts["judged"] += 1
            futures = list(task.futures)
            for _ in futures:
                self._count(verdict)
        for future in futures:
            future.set_result(verdict)

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            self._closing = True
            tasks = list(self._in_flight.values())
            self._in_flight.clear()
            self._queue.clear()
        for task in tasks:
            for future in task.futures:
                if not future.done():
                    future.set_exception(error)
