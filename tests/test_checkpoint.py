"""Checkpoints: which are kept, what is done with a damaged one, a full disk and another mesh."""

import errno
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import config, parallel
from sdjax.checkpoint import Checkpoints, bind_workdir
from sdjax.types import TrainState


def make_state(value, mesh=None):
    """A state whose arrays all depend on `value`."""
    mesh = mesh or parallel.make_mesh(fsdp=8)
    place = parallel.sharding(mesh, "DF")
    params = {"w": jax.device_put(jnp.full((8, 4), float(value)), place)}
    count = lambda: jax.device_put(jnp.int32(value), parallel.replicated(mesh))
    return TrainState(
        step=count(),
        params=params,
        frozen=None,
        teacher_params=jax.tree.map(lambda x: x + 0.5, params),
        opt_state=({"mu": params["w"] * 2},),
        skipped=count(),
    )


def assert_states_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_newest_and_best_are_kept(tmp_path):
    """The best checkpoint must outlive the newest K; steps without the metric are not best."""
    checkpoints = Checkpoints(tmp_path, keep=2, best_metric="eval/test/avg@4")
    scores = {1: 0.2, 2: 0.9, 3: 0.3, 4: None, 5: 0.1, 6: None}
    for step, score in scores.items():
        metrics = {"loss/total": 1.0} | ({} if score is None else {"eval/test/avg@4": score})
        checkpoints.save(step, make_state(step), metrics)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert_states_equal(checkpoints.restore(make_state(0), step=2), make_state(2))
    checkpoints.close()


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    """The next step overwrites the buffers at once; the checkpoint must hold the old values."""
    state, expected = make_state(3), make_state(3)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    overwrite(state)
    checkpoints.wait()
    assert_states_equal(checkpoints.restore(make_state(0)), expected)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    data = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
    for path in data:
        path.write_bytes(b"not what was written")
    caplog.set_level(logging.WARNING, logger="sdjax.checkpoint")
    assert_states_equal(Checkpoints(tmp_path, keep=3).restore(make_state(0)), make_state(1))
    assert "checkpoint 2" in caplog.text and "trying the one before it" in caplog.text


def test_half_written_checkpoint_is_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, make_state(1))
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, keep=3)
    assert again.steps() == [1]
    assert_states_equal(again.restore(make_state(0)), make_state(1))


def test_workdir_may_be_relative(tmp_path, monkeypatch):
    """The default workdir is runs/<config>; the saver itself takes absolute paths only."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("runs/tiny", keep=1)
    checkpoints.save(1, make_state(1))
    checkpoints.close()
    assert_states_equal(Checkpoints("runs/tiny", keep=1).restore(make_state(0)), make_state(1))


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path, keep=1).restore(make_state(0)) is None


def test_full_disk_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, make_state(1))
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._saver, "save_async", full)
    checkpoints.save(2, make_state(2))
    assert "No space left on device" in caplog.text and "free some space" in caplog.text
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_restores_onto_another_mesh(tmp_path, devices):
    """Saved on 8 devices; the numbers are the same wherever they come back."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, make_state(5))
    checkpoints.close()
    mesh = parallel.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    restored = Checkpoints(tmp_path, keep=1).restore(make_state(0, mesh))
    assert_states_equal(restored, make_state(5))
    assert restored.params["w"].sharding.mesh.size == devices


def test_workdir_belongs_to_one_config(tmp_path):
    c = config.base()
    bind_workdir(tmp_path, c)
    bind_workdir(tmp_path, c)
    c.mesh.fsdp = 4  # where it runs may change
    bind_workdir(tmp_path, c)
    c.teacher.ema_rate = 0.5
    with pytest.raises(ValueError, match=r"other values of config\.teacher\.ema_rate"):
        bind_workdir(tmp_path, c)
