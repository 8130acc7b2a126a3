"""Training adapters: they alone move, have moments, are averaged by the teacher and are saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import step
from sdjax.checkpoint import Checkpoints
from sdjax.data import packing
from sdjax.models import lora
from sdjax.models.config import LoraConfig
from tests.step import small

OBJECTIVE = small.OBJECTIVES["sdpo"]


def setup():
    """(train step, state, batch, scalars) of a model with adapters on two projections."""
    config = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    cfg, mesh = dataclasses.replace(small.CFG, lora=config), small.one_device()
    params = lora.add(small.params(), cfg, jax.random.key(1), mesh)
    train = step.make_train_step(
        cfg, OBJECTIVE, small.OPTIMIZER, mesh, step.StepConfig(remat="none")
    )
    state = step.init_state(params, OBJECTIVE, small.OPTIMIZER, mesh, "ema")
    batch = step.put_batch(
        packing.pack(small.responses(), packing.PackingSpec(2, 2, 40, 56, 32)), mesh
    )
    return train, state, batch, step.StepScalars(knobs=OBJECTIVE.knobs())


def copied(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def test_only_adapters_are_trained_averaged_and_saved(tmp_path):
    """The base model would be most of a checkpoint and of the teacher; none of it ever changes."""
    train, state, batch, scalars = setup()
    base, start = copied(state.frozen), copied(state.params)
    assert set(start) == {"w_q", "w_down"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(start))
    for _ in range(2):  # A moves once B has
        state, _ = train(state, batch, scalars)
    jax.tree.map(np.testing.assert_array_equal, base, copied(state.frozen))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, copied(state.params))
    assert min(jax.tree.leaves(moved)) > 0

    state = step.update_teacher(state, 0.25)
    jax.tree.map(
        lambda t, a, b: np.testing.assert_allclose(t, 0.75 * a + 0.25 * b, atol=1e-6),
        copied(state.teacher_params),
        start,
        copied(state.params),
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, state)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    elsewhere = state.replace(frozen=jax.tree.map(jnp.zeros_like, state.frozen))
    restored = again.restore(elsewhere)
    again.close()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(restored.frozen))
    jax.tree.map(
        np.testing.assert_array_equal,
        copied(restored.replace(frozen=None)),
        copied(state.replace(frozen=None)),
    )
