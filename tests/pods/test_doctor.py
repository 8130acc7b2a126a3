"""The doctor finds what it should, says the remedy, and stays off the network when told to."""

import subprocess
import sys
import threading
import urllib.request

import jax
import pytest

from sdjax import config, doctor


def states(findings):
    """{what: finding}."""
    return {f.what: f for f in findings}


def test_a_healthy_machine_fits_one_screen(tmp_path, monkeypatch):
    """Every line is short, nothing is at fault, and the workdir is left as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = doctor.examine(config.base(), str(tmp_path / "new"))
    assert [f for f in findings if f.state == doctor.FAULT] == []
    assert sum(str(f).count("\n") + 1 for f in findings) < 24
    assert not (tmp_path / "new").exists()


def test_offline_means_offline(monkeypatch):
    """HF_HUB_OFFLINE=1 must not open a connection."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("network used"))
    assert doctor.check_hub().state == doctor.OK
    c = config.base()
    c.model.path = "Qwen/Qwen3-8B"
    monkeypatch.setenv("HF_HOME", "/nowhere")
    finding = doctor.check_model(c)
    assert finding.state == doctor.FAULT and "HF_HUB_OFFLINE" in finding.remedy


def test_no_network_is_a_warning_with_a_remedy(monkeypatch):
    """A cluster without a way out can still run from its cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    finding = doctor.check_hub()
    assert finding.state == doctor.WARN and "HF_HUB_OFFLINE=1" in finding.remedy


def test_an_unwritable_workdir_is_a_fault(tmp_path):
    """A run that cannot save must be told before it starts."""
    (tmp_path / "file").write_text("")
    assert doctor.check_workdir(str(tmp_path / "file" / "run")).state == doctor.FAULT


def test_old_and_missing_packages_are_named(monkeypatch):
    """The remedy is the command to type."""
    monkeypatch.setattr(doctor, "MIN_VERSIONS", {"jax": "99.0", "no-such-package": "1"})
    found = states(doctor.check_versions())
    assert found["jax"].remedy == "pip install 'jax>=99.0'"
    assert found["no-such-package"].state == doctor.FAULT


def test_a_mesh_that_does_not_divide_the_devices_is_named():
    """8 fake devices, a mesh of 3."""
    c = config.base()
    c.mesh.fsdp = 3
    assert "multiple of 3" in doctor.check_devices(c).remedy


def test_devices_that_do_not_answer_are_a_fault(monkeypatch):
    """One host of a pod waits for the others for ever; the doctor must not."""
    held = threading.Event()
    monkeypatch.setattr(doctor.jax, "local_devices", lambda: held.wait(60) and jax.devices())
    monkeypatch.setattr(doctor, "DEVICES_TIMEOUT_S", 0.1)
    finding = doctor.check_devices(config.base())
    held.set()
    assert finding.state == doctor.FAULT and "no answer within 0.1 s" in finding.seen
    assert "all hosts at once" in finding.remedy


def test_half_a_cluster_is_a_fault(monkeypatch):
    """Better told by the doctor than by a hanging start."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    assert doctor.check_processes(config.base()).state == doctor.FAULT


def test_it_runs_as_the_command_that_the_docs_name(tmp_path):
    """python -m sdjax.main --config.mode=doctor."""
    done = subprocess.run(
        [sys.executable, "-m", "sdjax.main", "--config.mode=doctor", f"--workdir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "0 fault(s)" in done.stdout


def test_a_libtpu_that_jax_was_not_built_for_is_named(monkeypatch):
    """Such a pair compiles the step and then cannot read the program back (0.0.52 for 0.0.42)."""
    assert doctor.wanted_libtpu() is not None
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.0.7")
    finding = doctor.check_tpu_library()
    assert finding.state == doctor.WARN and "0.0.7" in finding.seen
    own = next(iter(doctor.wanted_libtpu())).version.replace("*", "1")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: own)
    assert doctor.check_tpu_library().state == doctor.OK
