"""Slots from memory, and requests that cannot fit."""

import dataclasses

import jax
import pytest

from sdjax.models.config import ModelConfig
from sdjax.rollout import memory
from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.cache import CacheSpec

QWEN3_8B = ModelConfig("qwen3", 151936, 4096, 36, 32, 8, 128, 12288, qk_norm="head")
LONG = EngineConfig(max_prompt_len=2048, max_new_tokens=38_912, compute_dtype="bfloat16")


def test_cache_bytes_are_those_of_the_arrays():
    spec = CacheSpec(2, 3, 4, "int8")
    arrays = spec.shapes(5, 7).values()
    assert spec.nbytes(5, 7) == 2 * sum(a.size * a.dtype.itemsize for a in arrays)
    assert spec.nbytes(5, 7) == 2 * (2 * 5 * 3 * 4 * 7 + 2 * 5 * 3 * 7 * 4)


def test_evaluation_with_38912_new_tokens_is_plannable():
    """avg@16 on 500 problems at this length: the slots that fit one v5p chip, and four."""
    one = memory.plan_slots(QWEN3_8B, LONG, 95 * 2**30)
    four = memory.plan_slots(QWEN3_8B, LONG, 95 * 2**30, tensor=4)
    assert 4 <= one.slots < four.slots
    assert one.total < 0.9 * 95 * 2**30
    twice = memory.needs(QWEN3_8B, dataclasses.replace(LONG, slots=2 * one.slots))
    assert twice.total > 0.9 * 95 * 2**30, "more would have fitted"
    small = dataclasses.replace(LONG, cache_dtype="int8")
    assert memory.plan_slots(QWEN3_8B, small, 95 * 2**30).slots >= 2 * one.slots


def test_the_impossible_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="38,912 tokens alone needs 5.79 GiB.*cache_dtype"):
        memory.plan_slots(QWEN3_8B, LONG, 16 * 2**30)


def test_an_engine_that_cannot_fit_says_how_many_slots_would():
    class Chip:
        def memory_stats(self):
            return {"bytes_limit": 32 * 2**30}

    class FakeMesh:
        import numpy as np

        devices = np.array([[Chip()]], dtype=object)
        shape = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}

    with pytest.raises(ValueError, match="64 slots.* set rollout.slots=2$"):
        memory.check(QWEN3_8B, LONG, FakeMesh())
    assert memory.check(QWEN3_8B, dataclasses.replace(LONG, slots=2), FakeMesh()) is None


def test_devices_that_do_not_tell_are_not_checked():
    mesh = jax.sharding.Mesh([jax.devices()[0]], ("data",))
    assert memory.check(QWEN3_8B, LONG, mesh) is None
