"""The whole training run on several real processes: the same numbers as one, a death survived."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from sdjax import config
from sdjax.models import from_pretrained, hf
from sdjax.train import process_groups

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARGUMENTS = [
    "--config=configs/tiny.py:tiny",
    "--config.batch.prompts=4",
    "--config.batch.mini_prompts=2",
    "--config.batch.group_size=2",
    "--config.sampling.max_new_tokens=16",
    "--config.eval.max_new_tokens=16",
    "--config.eval.sets=('test',)",
    "--config.eval.problems=2",
    "--config.eval.samples=1",
    "--config.eval.every=0",
    "--config.optimizer.lr=1e-3",
    "--config.optimizer.warmup_steps=0",
    "--config.teacher.context.kind=solution",
    "--config.checkpoint.export=False",
    "--config.profile.compilation_cache=",
    "--config.checkpoint.every=1",
]
COMPARED = ("loss/total", "optim/grad_norm", "distill/divergence", "batch/response_tokens")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The packaged model cut down to one layer: most of these tests' time is compilation."""
    whole = from_pretrained("tiny")
    cfg = dataclasses.replace(whole.cfg, n_layers=1, windows=(None,))
    layers = jax.tree.map(lambda x: x[:1], whole.params["layers"])
    folder = tmp_path_factory.mktemp("model") / "one-layer"
    params = {**whole.params, "layers": layers}
    hf.save(str(folder), cfg, params, whole.tokenizer, whole.generation, dtype="float32")
    return folder


def command(processes, workdir, steps, model, *more):
    """The run by launch/local.sh, one CPU device per process."""
    launcher = ["bash", "launch/local.sh", "--processes", str(processes), "--devices-each", "1"]
    arguments = [
        *ARGUMENTS,
        f"--config.model.path={model}",
        *more,
        f"--config.train.steps={steps}",
        f"--workdir={workdir}",
    ]
    return [*launcher, "--python", sys.executable, "--", *arguments]


def environment(model):
    """CPU only, no network, this checkout, and programs that one run leaves for the next."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # these tests mostly compile
        "JAX_COMPILATION_CACHE_DIR": str(model.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def train(processes, workdir, model, *more, steps=2):
    """Runs to the end; returns the rows of metrics.jsonl by step."""
    done = subprocess.run(
        command(processes, workdir, steps, model, *more),
        cwd=ROOT,
        env=environment(model),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return rows(workdir)


def rows(workdir):
    """{step: metrics} of a run."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_mini_batch_is_shared_by_all_processes(count):
    """Contiguous shares of the whole batch would change what an optimizer step sees."""
    c = config.base()
    c.batch.prompts, c.batch.mini_prompts = 16, 8
    shares = [process_groups(c, i, count) for i in range(count)]
    assert sorted(group for share in shares for group in share) == list(range(16))
    for share in shares:
        assert sum(group < 8 for group in share) == 8 // count
    with pytest.raises(ValueError, match="mini_prompts=8 does not split over 3 processes"):
        process_groups(c, 0, 3)


def test_two_processes_give_the_losses_of_one(tmp_path, model):
    """Each samples, verifies and packs its own problems; sums over devices may differ in order."""
    one, two = train(1, tmp_path / "one", model), train(2, tmp_path / "two", model)
    assert list(one) == list(two) == [0, 1, 2]
    for step in (1, 2):
        for name in COMPARED:
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-4), (step, name)
        assert two[step]["rollout/response_len_mean"] == pytest.approx(
            one[step]["rollout/response_len_mean"]
        )


@pytest.mark.slow
def test_four_processes_give_the_losses_of_one(tmp_path, model):
    """As above, with one group of responses for each process."""
    more = "--config.batch.mini_prompts=4"
    one, four = (train(n, tmp_path / str(n), model, more) for n in (1, 4))
    for step in (1, 2):
        for name in COMPARED:
            assert four[step][name] == pytest.approx(one[step][name], rel=1e-4), (step, name)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_same_command_resumes(tmp_path, model):
    """The other stops within seconds with a sentence; the rerun reaches the same numbers."""
    expected = train(2, tmp_path / "whole", model, steps=3)
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command(2, workdir, 3, model),
        cwd=ROOT,
        env=environment(model),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 800
    while not (workdir / "checkpoints" / "1").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-3000:]
        time.sleep(0.1)
    victim = worker_pid(process.pid, "1")
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "process 1" in out and "run the same command again" in out
    again = train(2, workdir, model, steps=3)
    for name in COMPARED:
        assert again[3][name] == pytest.approx(expected[3][name], rel=1e-4), name


def worker_pid(launcher, index):
    """The pid of the python process with JAX_PROCESS_ID=index below the launcher."""
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
            command_line = (path.parent / "cmdline").read_bytes()
            session = os.getpgid(int(path.parent.name)) == os.getpgid(launcher)
        except OSError:
            continue
        mine = f"JAX_PROCESS_ID={index}".encode() in variables and session
        if mine and b"sdjax.main" in command_line and b"spawn" not in command_line:
            return int(path.parent.name)
    raise AssertionError("no such process")
