"""The guards stop what should not go on, with a sentence that says what to do."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import base, check
from sdjax.objectives import guards


@pytest.mark.parametrize("value", [1.06, float("nan"), float("inf")])
def test_sampler_trainer_gap_stops_the_run(value):
    """A comparison that lets NaN through."""
    with pytest.raises(guards.HealthError, match=r"config.guard.max_prob_error is 1.05"):
        guards.check_prob_error({"drift/prob_error": jnp.asarray(value)}, 1.05)
    guards.check_prob_error({"drift/prob_error": np.float32(1.04)}, 1.05)


def test_skipped_updates_in_a_row_stop_the_run():
    guards.check_skipped({"optim/skipped_in_a_row": 4.0}, 5)
    with pytest.raises(guards.HealthError, match="non-finite gradient"):
        guards.check_skipped({"optim/skipped_in_a_row": 5.0}, 5)


@pytest.mark.parametrize("field", [("top_p", 0.95), ("top_k", 20), ("min_p", 0.1)])
def test_truncated_sampling_with_importance_ratios_is_refused(field):
    """Ratios over the whole vocabulary of tokens that were drawn from a part of it."""
    c = base()
    check(c)
    setattr(c.sampling, *field)
    with pytest.raises(ValueError, match="allow_truncated_sampling"):
        check(c)
    c.objective.allow_truncated_sampling = True
    check(c)
