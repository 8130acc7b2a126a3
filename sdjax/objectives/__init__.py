"""Objectives as pure functions on arrays: divergences, policy gradients, weights, and their sum.

`distillation_loss` and `policy_gradient_loss` take whole arrays of logits or log-probabilities;
the compiled step (`sdjax.step`) calls the same `token_loss` on chunks of response slots.
"""

from sdjax.objectives.losses import distillation_loss, policy_gradient_loss
from sdjax.objectives.objective import Knobs, ObjectiveConfig, Slots, token_loss

__all__ = [
    "Knobs",
    "ObjectiveConfig",
    "Slots",
    "distillation_loss",
    "policy_gradient_loss",
    "token_loss",
]
