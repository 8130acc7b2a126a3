"""Sampling: the engine with its slots and cache, and the samplers."""
