"""Checkpoints: which are kept, what is done with a damaged one, a full disk and another mesh."""

import errno
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import config, parallel
from sdjax.checkpoint import Checkpoints, bind_workdir, checksums
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


def large_state(value):
    """A state whose arrays fill files of their own."""
    w = jax.random.normal(jax.random.key(value), (64, 512))
    place = parallel.sharding(parallel.make_mesh(fsdp=8), "DF")
    return make_state(value).replace(params={"w": jax.device_put(w, place)})


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with checkpoints of large_state(1) and (2), with a metric; nobody writes to it."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder, keep=2, best_metric="m")
    for step in (1, 2):
        checkpoints.save(step, large_state(step), {"m": 0.5})
    checkpoints.close()
    return folder


def flip(data, share):
    """The bytes with one bit changed, at that share of the length."""
    at = int(share * (len(data) - 1))
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "early bit": lambda data: flip(data, 0.1),
    "middle bit": lambda data: flip(data, 0.5),
    "late bit": lambda data: flip(data, 0.97),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_goes_unnoticed(tmp_path, two_checkpoints, damage):
    """The storage format has no checksum of the data itself: one bit would train on in silence.

    What comes back is always one of the saved states, bit for bit; damage to a file that is not
    needed may do nothing.
    """
    saved = [large_state(1), large_state(2)]
    files = [p for p in (two_checkpoints / "checkpoints" / "2").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    for number, path in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        broken = folder / path.relative_to(two_checkpoints)
        broken.write_bytes(DAMAGES[damage](path.read_bytes()) if path.stat().st_size else b"x")
        restored = Checkpoints(folder, keep=2, best_metric="m").restore(make_like(saved[0]))
        step = int(restored.step)
        assert_states_equal(restored, saved[step - 1])
        assert step == 1 or path != largest


def make_like(state):
    """The layout of a state, without its values."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_know_places_and_bits_but_not_meshes(dtype):
    """The same on 8 devices and on 1; another for two elements swapped or one bit changed."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (8, 6))).astype(dtype)
    split = jax.device_put(x, parallel.sharding(parallel.make_mesh(fsdp=8), "DF"))
    value = checksums({"x": x})
    assert checksums({"x": split}) == value
    i = int(np.argmax(np.asarray(x[0] != x[1])))
    swapped = x.at[0, i].set(x[1, i]).at[1, i].set(x[0, i])
    assert checksums({"x": swapped}) != value
    flipped = np.asarray(x).copy()
    flipped.view(np.uint8)[3, 1] ^= 1
    assert checksums({"x": jnp.asarray(flipped)}) != value


def test_what_could_not_be_read_is_replaced_when_the_run_gets_there_again(
    tmp_path, two_checkpoints
):
    """Left in place it would never be written again, and would count among the newest kept."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "2" / "state" / "ocdbt.process_0").rglob("*"):
        path.write_bytes(b"") if path.is_file() else None
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert int(checkpoints.restore(make_like(large_state(1))).step) == 1
    checkpoints.save(2, large_state(2))
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps() == [1, 2]
    assert_states_equal(again.restore(make_like(large_state(1))), large_state(2))


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


@pytest.fixture
def no_large_files():
    """`no_large_files(True)`: no file may grow beyond a few kilobytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_does_not_end_the_run(tmp_path, caplog, no_large_files):
    """Neither the save that fails nor the next, which the saver greets with the old error; once
    there is room again, saving works."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, large_state(1))
    checkpoints.wait()
    no_large_files(True)
    for step in (2, 3):
        checkpoints.save(step, large_state(step))
    checkpoints.wait()
    no_large_files(False)
    assert checkpoints.steps() == [1]
    for step in (2, 3):
        assert f"could not save the checkpoint of step {step}" in caplog.text
    assert "free some space" in caplog.text
    checkpoints.save(4, large_state(4))
    checkpoints.close()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "4"]
    again = Checkpoints(tmp_path, keep=2)
    assert_states_equal(again.restore(make_like(large_state(1))), large_state(4))
    assert_states_equal(again.restore(make_like(large_state(1)), step=1), large_state(1))


def test_a_save_that_cannot_even_begin_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    """No room for the folder itself: the error comes from the call and not from its thread."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, make_state(1))
    checkpoints.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._saver, "save_async", full)
    checkpoints.save(2, make_state(2))
    assert "No space left on device" in caplog.text
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
