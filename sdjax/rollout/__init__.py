"""Sampling: the engine with its slots and cache, and the samplers."""

from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.engine import Engine

__all__ = ["Engine", "EngineConfig"]
