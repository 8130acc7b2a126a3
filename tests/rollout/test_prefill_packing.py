"""Packing prompts into prefill batches: nothing lost, nothing overlapping, little padding."""

import numpy as np
import pytest

from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.prompts import pack

PAD = 7


def random_prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 99, rng.integers(low, high)).tolist() for _ in range(count)]


@pytest.mark.parametrize("low, high", [(0, 3), (1, 65), (60, 65)])
@pytest.mark.parametrize("shapes", [((2, 64),), ((1, 64), (8, 64), (1, 128), (4, 128))])
def test_prompts_lie_side_by_side(low, high, shapes):
    """Each prompt is whole, counted from 0, in a segment of its own; the rest is padding."""
    prompts = random_prompts(40, low, high)
    batch = pack(prompts, shapes, PAD)
    assert batch.tokens_PT.shape in shapes and 0 in batch.places
    used = np.zeros(batch.tokens_PT.shape, int)
    segments = set()
    for i, (row, start) in batch.places.items():
        cells = row, slice(start, start + len(prompts[i]))
        assert start + len(prompts[i]) <= batch.tokens_PT.shape[1]
        np.testing.assert_array_equal(batch.tokens_PT[cells], prompts[i])
        np.testing.assert_array_equal(batch.index_PT[cells], np.arange(len(prompts[i])))
        assert len(set(batch.segment_PT[cells].tolist())) <= 1
        segments |= {(row, s) for s in batch.segment_PT[cells].tolist()}
        used[cells] += 1
    assert used.max() <= 1 and len(segments) == sum(bool(prompts[i]) for i in batch.places)
    assert (batch.segment_PT[used == 0] == 0).all() and (batch.segment_PT[used == 1] > 0).all()
    assert (batch.tokens_PT[used == 0] == PAD).all()


@pytest.mark.parametrize(
    "low, high, most",
    [(16, 65, 64), (60, 65, 64), (33, 40, 64), (200, 420, 1024), (600, 700, 1024)],
)
def test_little_of_a_full_queue_is_padding(low, high, most):
    """At most a tenth, also for lengths that two of do not fit into a power of two."""
    prompts = random_prompts(512, low, high)
    shapes = EngineConfig(max_prompt_len=most).buckets().prefills
    capacity = taken = 0
    while sum(map(len, prompts)) > 4096:
        batch = pack(prompts, shapes, PAD)
        capacity += batch.tokens_PT.size
        taken += sum(len(prompts[i]) for i in batch.places)
        prompts = [p for i, p in enumerate(prompts) if i not in batch.places]
    assert taken > 0.9 * capacity


def test_one_prompt_alone_takes_the_smallest_batch():
    """The terminal's single prompt does not wait for a batch of 4,096 tokens."""
    shapes = EngineConfig(max_prompt_len=1024).buckets().prefills
    tokens_PT = pack([[5] * 100], shapes, PAD).tokens_PT
    assert tokens_PT.size <= 512


def test_a_short_prompt_is_not_overtaken_for_ever():
    """A batch's worth of prompts competes by length, those behind it wait."""
    prompts = [[1] * 3, *random_prompts(100, 60, 65)]
    assert 0 in pack(prompts, ((1, 64),), PAD).places
    prompts[0], prompts[1] = prompts[1], prompts[0]
    batch = pack(prompts, ((4, 64),), PAD)
    assert max(batch.places) <= 5
