"""Host-side checks of a run's health: each raises one plain sentence, or says nothing.

They read the step's metrics (`sdjax.measure`) and the config; thresholds are in config.guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HealthError(RuntimeError):
    """The run must not go on; the message says what was seen, the limit and the remedy."""


def check_prob_error(metrics: Mapping[str, Any], limit: float) -> None:
    """Stops when sampler and trainer give the sampled tokens different probabilities.

    `drift/prob_error` is the mean of exp|trainer - sampler| of log-probabilities *before* any
    update on the batch, 1 when they agree. Then look at template, dtype, weights, positions.
    """
    value = float(metrics["drift/prob_error"])
    if not value <= limit:  # also catches NaN
        raise HealthError(
            f"sampler and trainer disagree: token probabilities differ by a factor of {value:.4g} "
            f"on average (drift/prob_error), the limit config.guard.max_prob_error is {limit}; "
            "look for different weights, dtype or prompt, or raise the limit if the sampler's "
            "precision explains it"
        )


def check_skipped(metrics: Mapping[str, Any], limit: int) -> None:
    """Stops when `limit` updates in a row were skipped because a gradient was not finite."""
    count = int(metrics["optim/skipped_in_a_row"])
    if count >= limit:
        raise HealthError(
            f"{count} updates in a row had a non-finite gradient and were skipped (config.guard."
            f"max_skipped is {limit}): lower config.optimizer.lr, or compute in float32 to find out"
        )
