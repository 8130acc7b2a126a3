"""Real processes on this machine: they find each other, fail together, stop together."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from sdjax import config, distributed
from sdjax.distributed.cluster import StartupError, detect, expand_nodelist
from sdjax.distributed.rollcall import Peer, Watch, compare, roll_call_port
from sdjax.distributed.stop import StopSignal

WORKER = pathlib.Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


def free_port() -> int:
    """A coordinator port whose roll-call port is free too."""
    for _ in range(50):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", roll_call_port(f"localhost:{port}")))
            except OSError:
                continue
            return port
    raise AssertionError("no free pair of ports")


def start(indices, count, what, *more):
    """Starts worker processes; returns {index: (exit code, output)} once all have ended."""
    port = free_port()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    processes = {
        i: subprocess.Popen(
            [sys.executable, str(WORKER), str(i), str(count), str(port), what, *map(str, more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for i in indices
    }
    try:
        return {i: (p.communicate(timeout=90)[0], p.returncode) for i, p in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_meet_and_exchange(count):
    """Gathers keep the order of the processes, whatever the sizes, and arrays span processes."""
    for out, code in start(range(count), count, "ok").values():
        assert code == 0 and "done" in out, out


def test_missing_processes_are_named():
    """A run started on some hosts only must say which are missing, not hang."""
    results = start([0, 2], 4, "absent")
    for out, code in results.values():
        assert code == 2, out
        assert "2 of 4 processes did not start within 4 s: missing 1, 3;" in out


def test_a_lone_worker_names_process_zero():
    """Without process 0 the others must not wait for ever either."""
    out, code = start([1], 2, "absent")[1]
    assert code == 2 and "process 0 at localhost" in out


def test_other_configs_are_named_at_the_start():
    """Different programs deadlock in the first collective; the field is named before jax starts."""
    for out, code in start([0, 1], 2, "differ").values():
        assert code == 2
        assert "config.seed=1 but process 0 has 0" in out


def test_other_shapes_are_named():
    """The later check, for what is known only once jax is up; all processes leave."""
    for out, code in start([0, 1], 2, "shapes").values():
        assert code == 2, out  # not 75: the launcher must not try again
        assert "the packed shape of process 1 differs from process 0's" in out


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_takes_the_others_along(victim):
    """The survivor must leave within seconds with a sentence, not hang in its collective."""
    results = start([0, 1], 2, f"kill{victim}")
    out, code = results[1 - victim]
    assert results[victim][1] == -9
    # jax's own watch of process 0 may be quicker than ours; both end the process at once.
    assert code == 75 or (victim == 0 and code == -6), out
    if code == 75:
        assert f"process {victim}" in out and "run the same command again" in out


def test_a_failure_is_told_to_the_others():
    """The reason must appear in every log, not only in that of the host that failed."""
    results = start([0, 1], 2, "fail")
    assert results[1][1] == 1 and "Traceback" in results[1][0]
    assert results[0][1] == 75
    assert "process 1 failed: RuntimeError: the disk is on fire" in results[0][0]


def test_sigterm_to_one_stops_all_at_the_same_step():
    """A step that only some processes take would leave them in a collective for ever."""
    results = start([0, 1], 2, "stop")
    steps = {out.split("stopped at ")[1].split()[0] for out, _ in results.values()}
    assert len(steps) == 1
    # not 0: a launcher that restarts what did not end well must start this again
    assert all(code == 75 for _, code in results.values())


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
    """The others must not wait for it at a barrier, nor go on from another step than it does."""
    for out, code in start([0, 1], 2, "damaged", tmp_path).values():
        assert code == 0 and "restored 1" in out, out
        assert "checkpoint 2" in out and "trying the one before it" in out


def detect_in(env, method="auto", metadata=None, on_tpu=False, coordinator="", n=0, i=-1):
    """`detect` with everything given."""
    return detect(method, coordinator, n, i, env, metadata, lambda: on_tpu)


def test_alone_without_any_hint():
    """A laptop must not look for a pod."""
    assert detect_in({}).alone


def test_explicit_settings_from_config_or_environment():
    """Both ways give the same cluster."""
    env = {
        "JAX_COORDINATOR_ADDRESS": "h:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "2",
    }
    assert detect_in(env) == detect_in({}, coordinator="h:1234", n=4, i=2)


@pytest.mark.parametrize(
    "env, says",
    [
        ({"JAX_COORDINATOR_ADDRESS": "nohost"}, "host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "number of processes"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES='x'"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "process id -1"),
    ],
)
def test_half_described_clusters_are_refused(env, says):
    """Half a description must not fall back to a single process, which would train alone."""
    with pytest.raises(StartupError, match=says.replace("[", r"\[")):
        detect_in(env)


def test_slurm_tasks_and_gpus():
    """Two tasks per node take one GPU each; the coordinator is the first node."""
    env = {
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "gpu[09-10],big",
        "SLURM_NTASKS": "6",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    }
    cluster = detect_in(env)
    assert (cluster.process_index, cluster.process_count) == (3, 6)
    assert cluster.coordinator == "gpu09:61440" and cluster.local_device_ids == (1,)
    assert cluster.hosts == ("gpu09", "gpu09", "gpu10", "gpu10", "big", "big")
    assert detect_in({**env, "CUDA_VISIBLE_DEVICES": "0"}).local_device_ids is None


@pytest.mark.parametrize(
    "text, nodes",
    [
        ("a", ["a"]),
        ("a1,b2", ["a1", "b2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[001,007-008],m[2]", ["n001", "n007", "n008", "m2"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
    ],
)
def test_slurm_node_lists(text, nodes):
    """The short form keeps leading zeros."""
    assert expand_nodelist(text) == nodes


def test_tpu_pod_by_environment_and_by_metadata():
    """GKE tells by variables, plain TPU VMs by the metadata server in either of two formats."""
    gke = detect_in({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, on_tpu=True)
    assert (gke.process_index, gke.process_count, gke.coordinator) == (1, 2, "a:8482")
    facts = {"worker-network-endpoints": "x:0:10.0.0.1,x:1:10.0.0.2", "agent-worker-number": "1"}
    vm = detect_in({}, metadata=facts.__getitem__, on_tpu=True)
    assert vm.hosts == ("10.0.0.1", "10.0.0.2") and vm.process_index == 1
    facts["worker-network-endpoints"] = "10.0.0.1"
    assert detect_in({}, metadata=facts.__getitem__, on_tpu=True).alone


def test_tpu_multislice_counts_all_hosts():
    """Slice 1's worker 0 is process 2 of 4."""
    env = {
        "TPU_WORKER_HOSTNAMES": "c,d",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
    }
    cluster = detect_in(env, on_tpu=True)
    assert (cluster.process_index, cluster.process_count) == (2, 4)
    assert cluster.coordinator == "a:8482"


def test_cpu_runs_on_tpu_vms_stay_alone():
    """JAX_PLATFORMS=cpu on a TPU host is somebody debugging there."""
    assert detect_in({"JAX_PLATFORMS": "cpu"}, on_tpu=True).alone


def test_differences_are_listed_with_both_values():
    """Also a field that one side does not have."""
    assert compare({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, "p") == []
    (line,) = compare({"a": "1"}, {"a": "1", "b": "2"}, "process 3 (h)")
    assert line.startswith("process 3 (h) has b=2 but process 0 has nothing")


@pytest.mark.parametrize("port", [8482, 61440, 65535, 5000])
def test_roll_call_port_is_a_port(port):
    """The offset must neither leave the range nor hit the coordinator."""
    other = roll_call_port(f"h:{port}")
    assert 1024 < other < 65536 and other != port


def test_a_silent_peer_counts_as_lost():
    """A vanished host closes no connection: only the clock can tell."""
    ours, theirs = socket.socketpair()
    lost = threading.Event()
    said = []
    Watch(0, [Peer(1, "h", ours)], 0.4, lambda loss, code: (said.append((loss, code)), lost.set()))
    assert lost.wait(timeout=20)
    assert said == [("process 1 (h) has been silent for 0.4 s", 75)]
    theirs.close()


def test_goodbye_is_not_a_loss():
    """The first process to finish must not make the others fail."""
    ours, theirs = socket.socketpair()
    said = []
    here = Watch(0, [Peer(1, "h", ours)], 20.0, lambda *news: said.append(news))
    there = Watch(1, [Peer(0, "h", theirs)], 20.0, lambda *news: said.append(news))
    there.close()
    deadline = time.monotonic() + 10
    while not here._peers[0].left and time.monotonic() < deadline:
        time.sleep(0.01)
    here.close()
    assert here._peers[0].left and said == []


def test_a_stopped_run_ends_with_75_and_a_finished_one_does_not():
    """Alone as in company: what restarts a run looks at the code only."""
    with distributed.session(config.base()) as run:
        run.stop.interrupt()
        assert not run.stop.agreed()
    with pytest.raises(SystemExit) as end, distributed.session(config.base()) as run:
        run.stop.request("SIGTERM")
        with pytest.raises(distributed.StopRequested):
            run.stop.interrupt()
        assert run.stop.agreed()
    assert end.value.code == 75


def test_stop_signal_takes_and_returns_the_handlers():
    """A notebook must get its Ctrl-C back; the flag is set from a real signal."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.agreed() and stop.reason == "SIGTERM"
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before
