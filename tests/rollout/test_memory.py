"""Slots from memory, and requests that cannot fit."""

import dataclasses

import jax
import numpy as np
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


class Chip:
    """A device that reports its memory, in a mesh of one."""

    def __init__(self, gib: int):
        self.devices = np.array([[self]], dtype=object)
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
        self.gib = gib

    def memory_stats(self):
        return {"bytes_limit": self.gib * 2**30}


def test_an_engine_takes_the_slots_that_fit(caplog):
    """64 slots of 38,912 tokens were asked for: the number comes from the memory, and is told."""
    fitting = memory.fitted(QWEN3_8B, LONG, Chip(32))
    assert fitting == dataclasses.replace(LONG, slots=2)
    assert "64 slots: " in caplog.text and "sampling with 2 slots: " in caplog.text
    assert memory.fitted(QWEN3_8B, fitting, Chip(32)) is fitting
    small = dataclasses.replace(LONG, max_new_tokens=64, max_prompt_len=64)
    assert memory.fitted(QWEN3_8B, small, Chip(95)) is small, "never more than were asked for"


def test_an_engine_without_room_for_one_response_is_refused():
    with pytest.raises(ValueError, match="1 slots: .* do not fit into the 14.40 GiB"):
        memory.fitted(QWEN3_8B, LONG, Chip(16))


def test_devices_that_do_not_tell_keep_their_slots():
    mesh = jax.sharding.Mesh([jax.devices()[0]], ("data",))
    assert memory.fitted(QWEN3_8B, LONG, mesh) is LONG
