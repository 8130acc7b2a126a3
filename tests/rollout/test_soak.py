"""Hours of rollouts in small: random lengths and arrivals, nothing lost, nothing growing."""

import collections
import gc
import os
import pathlib
import resource
import time

import jax
import numpy as np
import pytest
from decoding import MODEL

from sdjax.records import Request, SamplingParams


def arrivals(rng, first_id: int, count: int):
    """`count` random requests with pauses between them; a few have prompts that are too long."""
    for i in range(first_id, first_id + count):
        while rng.random() < 0.3:
            yield None
        prompt = rng.integers(3, MODEL.vocab_size, rng.integers(1, 19)).tolist()
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            top_p=float(rng.choice([0.9, 1.0])),
            max_new_tokens=int(np.clip(rng.geometric(0.1), 1, 28)),
            seed=i,
        )
        yield Request(i, tuple(prompt), int(rng.integers(1, 4)), sampling)


def resident_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def soak(engine, params, more) -> dict[str, list[float]]:
    """Calls `generate` while `more(calls)`; checks every answer and records what must not grow."""
    rng, first_id = np.random.default_rng(0), 0
    weights = engine.prepare(params)
    grown = collections.defaultdict(list)
    while more(len(grown["arrays"])):
        asked: dict[int, Request] = {}
        finished = collections.Counter()

        def watched(source, asked=asked):
            for request in source:
                if request is not None:
                    asked[request.id] = request
                yield request

        count = int(rng.integers(5, 25))
        before = engine.stats()["dropped"]
        done = engine.generate(
            weights,
            watched(arrivals(rng, first_id, count)),
            on_finish=lambda c, f=finished: f.update([(c.request_id, c.index)]),
        )
        first_id += count
        kept = [r for r in asked.values() if len(r.prompt_tokens) <= engine.cfg.max_prompt_len]
        assert len(asked) == count
        assert engine.stats()["dropped"] - before == count - len(kept)
        expected = [(r.id, i) for r in kept for i in range(r.n)]
        assert [(c.request_id, c.index) for c in done] == expected
        assert finished == collections.Counter(expected)
        assert all(len(c.tokens) <= asked[c.request_id].sampling.max_new_tokens for c in done)
        del done
        gc.collect()
        grown["arrays"].append(len(jax.live_arrays()))
        grown["compilations"].append(engine.compilations)
        grown["mb"].append(resident_mb())
    return grown


def test_short_soak(params, engine):
    """No request is lost or answered twice; no array survives a call."""
    engine.warm_up(params)
    grown = soak(engine, params, lambda calls: calls < 12)
    assert len(set(grown["arrays"])) == 1 and len(set(grown["compilations"])) == 1


@pytest.mark.slow
def test_long_soak(params, engine):
    """Ten minutes (SDJAX_SOAK_S seconds): memory of the process stays where it was after one."""
    seconds = float(os.environ.get("SDJAX_SOAK_S", 600))
    engine.warm_up(params)
    end = time.monotonic() + seconds
    grown = soak(engine, params, lambda calls: time.monotonic() < end)
    assert len(set(grown["arrays"])) == 1 and len(set(grown["compilations"])) == 1
    settled = max(1, len(grown["mb"]) // 10)
    growth = np.mean(grown["mb"][-settled:]) - np.mean(grown["mb"][settled : 2 * settled])
    print(f"{len(grown['mb'])} calls, {growth:.1f} MB growth")
    assert growth < 20
