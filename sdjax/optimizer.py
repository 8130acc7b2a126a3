"""AdamW with warm-up and a schedule, global-norm clipping, and updates that skip bad gradients.

The optimizer's state is a plain pytree inside TrainState; its count of updates drives the schedule,
so a resumed run needs nothing else. Conventions are verl's (METHODS 1.6).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sdjax.types import Array, Params

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Fields of the config section `optimizer`, and the number of updates of the whole run."""

    lr: float = 1e-5
    warmup_steps: int = 10
    schedule: str = "constant"
    final_lr_frac: float = 0.1
    total_steps: int = 0  # optimizer updates in all; needed by schedules that decay
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    state_dtype: str = "float32"

    @classmethod
    def from_config(cls, c: Any) -> OptimizerConfig:
        """From `optimizer`, `train` and `batch`: a training batch makes several updates."""
        fields = {
            f.name: c.optimizer[f.name] for f in dataclasses.fields(cls) if f.name in c.optimizer
        }
        updates = c.train.steps * (c.batch.prompts // c.batch.mini_prompts)
        return cls(**fields, total_steps=updates)


def learning_rate(config: OptimizerConfig, count: Array | int) -> Array:
    """Learning rate of update `count` (0-based): linear warm-up from 0, then the schedule.

    As in the reference the first update of a warm-up has rate 0.
    """
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, count / max(1, config.warmup_steps)) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}"
        )
    left = max(1, config.total_steps - config.warmup_steps)
    done = jnp.clip((count - config.warmup_steps) / left, 0.0, 1.0)
    shape = (1 + jnp.cos(jnp.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * warm * (config.final_lr_frac + (1 - config.final_lr_frac) * shape)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with decoupled decay on every parameter; clipping is done by `apply_gradient`."""
    return optax.adamw(
        lambda count: learning_rate(config, count),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.state_dtype),
    )


def update_count(opt_state: Any) -> Array:
    """How many updates were applied (skipped ones do not count)."""
    return optax.tree_utils.tree_get(opt_state, "count", filtering=_is_adam_count)


def _is_adam_count(path: Any, _: Any) -> bool:
    """Adam and the schedule both count; they agree, and Adam's is taken."""
    return any(getattr(key, "tuple_name", "") == "ScaleByAdamState" for key in path)


def apply_gradient(
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    grad: Params,
    opt_state: Any,
    params: Params,
) -> tuple[Params, Any, Array, Array]:
    """(params, opt_state, gradient norm, finite): one clipped update, or none at all.

    Clips by torch's rule, scale = clip_norm / (norm + 1e-6) when below 1. When the norm is not
    finite, params and opt_state come back unchanged and `finite` is False.
    """
    norm = optax.tree.norm(grad)
    finite = jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    # zero a bad gradient first: 0 * inf would put NaN into the moments before they are discarded
    grad = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0).astype(g.dtype), grad)
    updates, new_opt_state = optimizer.update(grad, opt_state, params)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return (
        keep(optax.apply_updates(params, updates), params),
        keep(new_opt_state, opt_state),
        norm,
        finite,
    )
