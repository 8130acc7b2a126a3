"""Objectives as pure functions on arrays: divergences, policy gradients, weights, and their sum.

`distillation_loss` and `policy_gradient_loss` take whole arrays of logits or log-probabilities;
the compiled step (`sdjax.step`) calls the same `token_loss` on chunks of response slots.
"""

from sdjax.objectives.advantages import group_advantage
from sdjax.objectives.importance import importance_metrics, offpolicy_metrics, rollout_weight
from sdjax.objectives.losses import distillation_loss, policy_gradient_loss
from sdjax.objectives.objective import Knobs, ObjectiveConfig, Slots, token_loss
from sdjax.objectives.policy_gradient import kl_penalty

__all__ = [
    "Knobs",
    "ObjectiveConfig",
    "Slots",
    "distillation_loss",
    "group_advantage",
    "importance_metrics",
    "kl_penalty",
    "offpolicy_metrics",
    "policy_gradient_loss",
    "rollout_weight",
    "token_loss",
]
