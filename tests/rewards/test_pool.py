"""The pool: hanging, dying and greedy workers, threads, order, independence from its size."""

import logging
import os
import threading

import pytest

from sdjax.rewards import Verdict, VerifierPool, get_reward, verify

MISBEHAVE = "tests.rewards.helpers:misbehave"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers find the tests' own rewards through PYTHONPATH."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root
    yield
    if old is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = old


def test_bad_items_do_not_touch_the_others(caplog):
    """A hang is killed, a death is replaced, memory is refused; all other items are judged."""
    answers = ["a", "hang", "b", "crash", "c", "memory", "d", "raise", "e", "print", "f"]
    golds = ["a", "x", "b", "x", "x", "x", "d", "x", "e", "print", "f"]
    with caplog.at_level(logging.CRITICAL), VerifierPool(2, reward=MISBEHAVE, deadline_s=0.5) as p:
        verdicts = p.score(answers, golds)
        stats = p.stats()
    by_answer = dict(zip(answers, verdicts, strict=True))
    assert [by_answer[k].correct for k in "abcdef"] == [True, True, False, True, True, True]
    assert by_answer["hang"].reason == "timeout"
    assert by_answer["crash"].reason == "crash"
    assert by_answer["memory"].reason == "error"
    assert by_answer["raise"].reason == "error"
    assert by_answer["print"].correct  # stray prints do not corrupt the protocol
    assert (stats["timeout"], stats["crash"], stats["error"]) == (1, 1, 2)


def test_results_do_not_depend_on_the_number_of_workers():
    """Order and verdicts are those of the items, however they were spread."""
    answers = [f"\\boxed{{{k}+x}}" for k in range(12)] + ["\\boxed{9^{9^{9}}}", "none"]
    golds = [f"x+{k % 7}" for k in range(12)] + ["1", "1"]
    found = []
    for workers in (1, 3):
        with VerifierPool(workers) as pool:
            found.append(pool.score(answers, golds))
    assert found[0] == found[1]
    assert [v.correct for v in found[0][:12]] == [k == k % 7 for k in range(12)]


def test_duplicates_are_judged_once():
    """Groups repeat answers: each (answer, gold) costs one task."""
    with VerifierPool(1) as pool:
        verdicts = pool.score(["\\boxed{x+1}"] * 20, ["1+x"] * 20)
        again = pool.score(["so \\boxed{x+1}"], ["1+x"])
        stats = pool.stats()
    assert all(v.correct for v in verdicts + again)
    assert stats["judged"] == 1 and stats["cache_hits"] == 20


def test_workers_are_recycled():
    """A pool that recycles after every second task gives the same verdicts."""
    with VerifierPool(1, reward=MISBEHAVE, recycle_after=2) as pool:
        verdicts = pool.score([str(k) for k in range(6)], [str(k) for k in range(6)])
    assert all(v.correct for v in verdicts)


def test_workers_never_import_jax():
    """jax in a worker would cost a second each and could grab the accelerator."""
    with VerifierPool(1, reward="tests.rewards.helpers:modules") as pool:
        jax, records = pool.score(["jax", "sdjax.records"], ["", ""])
    assert not jax.correct and records.correct
    assert jax.extracted == "2.0"  # the reward's function sees the pool's config


def test_from_threads_beside_jax():
    """verify works from any thread of a process that runs jax, and survives its starter's end."""
    import jax.numpy as jnp

    jnp.ones(3).sum().block_until_ready()
    found = []

    def ask(k):
        found.append((k, verify(f"\\boxed{{y+{k}}}", f"{k}+y").correct))

    for batch in (range(2), range(2, 5)):  # the first thread, which starts the worker, ends
        threads = [threading.Thread(target=ask, args=(k,)) for k in batch]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == [(k, True) for k in range(5)]


def test_streaming_and_close():
    """Futures arrive while others are still wanted; what is open when the pool closes fails."""
    with VerifierPool(1, reward=MISBEHAVE, deadline_s=60) as pool:
        assert pool.submit("a", "a").result().correct
        stuck = pool.submit("hang", "a")
        waiting = pool.submit("b", "b")
    for future in (stuck, waiting):
        with pytest.raises(RuntimeError, match="closed"):
            future.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("c", "c")


def test_mistakes_get_one_sentence():
    """A user's wrong name or size is answered at once, in the parent."""
    with pytest.raises(ValueError, match="reward.name='nope' is unknown: use one of"):
        VerifierPool(1, reward="nope")
    with pytest.raises(ValueError, match="cannot be loaded"):
        get_reward("no_such_module:f")
    with pytest.raises(ValueError, match="workers=0"):
        VerifierPool(0)
    with VerifierPool(1) as pool, pytest.raises(ValueError, match="2 responses but 1 golds"):
        pool.score(["a", "b"], ["a"])


def test_workers_that_cannot_start_say_why(monkeypatch):
    """A broken environment must raise with the worker's own words, not wait for ever."""
    monkeypatch.setattr("sdjax.rewards.process.WORKER_MODULE", "sdjax.rewards.no_such_module")
    with VerifierPool(1, reward=MISBEHAVE) as pool:
        with pytest.raises(RuntimeError, match="cannot start: .*no_such_module"):
            pool.submit("a", "a").result(timeout=60)


def test_verdict_reward():
    """The number that the trainer uses."""
    assert Verdict(True, "1", "equal").reward == 1.0 and Verdict(False, None, "x").reward == 0.0
