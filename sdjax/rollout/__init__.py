"""Sampling: the engine with its slots and cache, the samplers, and `sample` for notebooks."""

from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.engine import Engine
from sdjax.rollout.generate import sample

__all__ = ["Engine", "EngineConfig", "sample"]
