"""Decoders of Hugging Face checkpoints as pure functions, with `from_pretrained` for notebooks."""

from sdjax.models.config import LoraConfig, ModelConfig
from sdjax.models.pretrained import Model, from_pretrained

__all__ = ["LoraConfig", "Model", "ModelConfig", "from_pretrained"]
