"""The whole run on the tiny model: same numbers again, after a stop, and after a kill."""

import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sdjax import train
from sdjax.distributed import StopRequested
from sdjax.metrics import read_metrics
from sdjax.models import from_pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 3
# What depends on the machine, or on how the work of one batch was interleaved.
UNSTABLE = ("wall_time", "time/", "memory/", "tokens_per_s", "verifier/", "while_sampling")
OVERRIDES = {
    "train.steps": STEPS,
    "batch.mini_prompts": 4,
    "eval.problems": 4,
    "eval.every": 2,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 0,
    "teacher.ema_rate": 0.5,
    "teacher.context.kind": "solution",  # so that every response is distilled at once
    "checkpoint.export_dtype": "float32",
}


def tiny_config(variant="tiny"):
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(variant)
    c.update_from_flattened_dict(OVERRIDES)
    return c


class StopAt:
    """A stop signal that the loop sees when it asks for the `time`-th time, counted from 1.

    It asks after every evaluation (before step 1 and after steps 2 and 3 here), after the sampling
    and after the updates of every batch. With `sampling`, the signal arrives before: what is being
    sampled is given up.
    """

    def __init__(self, time, sampling=False):
        self.left, self.sampling = time, sampling

    def interrupt(self, *_):
        if self.sampling and self.left == 1:
            raise StopRequested

    def agreed(self):
        self.left -= 1
        return self.left == 0


def stable(workdir):
    """The rows of a run without what depends on the machine."""
    return [
        {k: v for k, v in row.items() if not any(name in k for name in UNSTABLE)}
        for row in read_metrics(workdir)
    ]


def assert_same(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            same = value == other[key] or (math.isnan(value) and math.isnan(other[key]))
            assert same, f"step {row['step']}: {key} is {value}, not {other[key]}"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of STEPS steps that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    report = train.run(tiny_config(), str(workdir))
    assert report == workdir / "report.md"
    return workdir


def test_run_leaves_everything_that_is_promised(whole_run):
    rows = read_metrics(whole_run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    last = rows[-1]
    assert last["step/compilations"] == 1, "the train step must compile once per run"
    assert last["drift/prob_error"] < 1.001
    assert last["batch/distilled_frac"] == 1.0
    for name in (
        "reward/mean reward/group_solved_frac rollout/response_len_mean rollout/response_len_p95 "
        "rollout/truncated_frac epistemic/wait loss/total distill/divergence student/entropy "
        "policy/kl_initial optim/grad_norm optim/lr rollout/tokens_per_s step/tokens_per_s "
        "time/sample_s time/step_s memory/peak_gb eval/test/avg@2"
    ).split():
        assert math.isfinite(last[name]), name
    assert rows[2]["policy/kl_initial"] != 0, "the student must have moved"
    names = {json.loads(line)["name"] for line in open(whole_run / "samples.jsonl")}
    assert {"rollout/0", "teacher/0"} <= names
    assert list((whole_run / "tensorboard").iterdir())
    assert "![" in (whole_run / "report.md").read_text()


def test_export_is_the_trained_model(whole_run):
    """The exported folder must hold the last parameters, not the initial ones."""
    exported = from_pretrained(str(whole_run / "export"))
    initial = from_pretrained("tiny")
    tokens = [list(range(5, 25))]
    change = abs(exported.logits(tokens) - initial.logits(tokens)).max()
    assert 1e-4 < change < 10
    assert exported.tokenizer.chat_template == initial.tokenizer.chat_template


def test_adapters_are_exported_alone_on_request(tmp_path):
    """checkpoint.export_lora="adapters" writes what PEFT opens instead of the merged model."""
    c = tiny_config()
    c.model.lora.rank, c.model.lora.targets = 4, ("q", "v")
    c.checkpoint.export_lora = "adapters"
    c.train.steps, c.eval.sets = 1, ()
    text = train.run(c, str(tmp_path)).read_text()
    about = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert (about["r"], about["target_modules"]) == (4, ["q_proj", "v_proj"])
    assert not (tmp_path / "export" / "model.safetensors").exists()
    assert "verified while others were sampled" in text


def test_stopped_and_resumed_run_gives_the_same_numbers(whole_run, tmp_path):
    """Catches any state that is neither in the checkpoint nor a function of (config, step)."""
    c = tiny_config()
    c.checkpoint.every = 100  # only the stop saves
    assert train.run(c, str(tmp_path), StopAt(6)) is None
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert train.run(c, str(tmp_path)) == tmp_path / "report.md"
    assert_same(stable(tmp_path), stable(whole_run))


def test_a_batch_given_up_while_it_is_sampled_is_done_again(whole_run, tmp_path):
    """A grace period is shorter than sampling a large batch: the state before it is saved."""
    c = tiny_config()
    c.checkpoint.every = 100  # only the stop saves
    assert train.run(c, str(tmp_path), StopAt(2, sampling=True)) is None
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    assert train.run(c, str(tmp_path)) == tmp_path / "report.md"
    assert_same(stable(tmp_path), stable(whole_run))


@pytest.mark.parametrize("time, steps", [(1, 0), (5, 3), (8, 4)])
def test_an_evaluation_given_up_is_done_by_the_next_start(whole_run, tmp_path, time, steps):
    """The first, one between steps, and the last: hours for the paper's sizes."""
    c = tiny_config()
    c.checkpoint.every = 100  # only the stop saves
    assert train.run(c, str(tmp_path), StopAt(time, sampling=True)) is None
    rows = read_metrics(tmp_path)
    assert len(rows) == steps and not any("eval/" in name for row in rows[-1:] for name in row)
    assert train.run(c, str(tmp_path)) == tmp_path / "report.md"
    assert_same(stable(tmp_path), stable(whole_run))


def test_killed_run_gives_the_same_numbers(whole_run, tmp_path):
    """SIGKILL after a checkpoint, in the middle of whatever comes then; the same command again."""
    flags = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    command = [sys.executable, "-m", "sdjax.main", "--config=configs/tiny.py:tiny", *flags]
    command += [f"--workdir={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoints" / "1").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert_same(stable(tmp_path), stable(whole_run))


def test_another_config_does_not_resume_into_the_folder(whole_run):
    c = tiny_config()
    c.optimizer.lr = 5e-4
    with pytest.raises(ValueError, match=r"other values of config\.optimizer\.lr"):
        train.run(c, str(whole_run))


def test_grpo_needs_no_teacher(tmp_path):
    """Two updates per batch: the second is off-policy, with recomputed log-probabilities."""
    c = tiny_config("grpo,tiny")
    c.batch.mini_prompts = 2
    c.train.steps, c.eval.sets, c.checkpoint.export = 1, (), False
    train.run(c, str(tmp_path))
    row = read_metrics(tmp_path)[-1]
    assert "distill/divergence" not in row and "teacher/has_context_frac" not in row
    assert math.isfinite(row["loss/policy"]) and row["step/compilations"] == 1
