"""Metrics files survive kills and resumption; the display is readable in a log file."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import metrics
from sdjax.progress import Progress, format_seconds
from sdjax.records import Problem, Rollout, Verdict


def write_steps(workdir, steps, resume_step=None, **kwargs):
    with metrics.MetricsWriter(workdir, resume_step, tensorboard=False, **kwargs) as writer:
        for step in steps:
            writer.write(step, {"loss/total": step / 10})
            writer.text(step, "rollout/0", f"text {step}")


def test_rows_come_back_with_their_numbers(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(
            1,
            {
                "loss/total": jnp.float32(0.5),
                "loss/bf16": jnp.bfloat16(0.5),
                "count": np.int64(3),
                "flag": True,
            },
        )
    (row,) = metrics.read_metrics(tmp_path)
    assert row.pop("wall_time") > 0
    assert row == {"step": 1, "loss/total": 0.5, "loss/bf16": 0.5, "count": 3, "flag": 1}


def test_non_finite_numbers_leave_plain_json_and_read_as_nan(tmp_path):
    """Catches NaN literals, which are not JSON and stop other tools from reading the file."""
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": float("nan"), "b": jnp.inf, "c": 1.0})
    text = (tmp_path / metrics.METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["a"] is None
    (row,) = metrics.read_metrics(tmp_path)
    assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 1.0


@pytest.mark.parametrize("value", [np.zeros(2), "text", None, np.zeros(0)])
def test_a_value_that_is_not_a_number_is_refused_by_name(tmp_path, value):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="metric loss/total"):
            writer.write(1, {"loss/total": value})


def test_resuming_removes_the_steps_that_are_redone(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    rows = metrics.read_rows(tmp_path / metrics.METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    samples = metrics.read_rows(tmp_path / metrics.SAMPLES_FILE)
    assert [row["text"] for row in samples] == [f"text {step}" for step in range(1, 6)]


def test_a_half_written_last_line_is_dropped(tmp_path):
    """Catches a resumed run that dies on, or glues its first row to, what a kill left behind."""
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / metrics.METRICS_FILE
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2, 3]


def test_a_complete_row_without_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / metrics.METRICS_FILE
    path.write_text(path.read_text()[:-1])
    write_steps(tmp_path, [3], resume_step=2)
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / metrics.METRICS_FILE
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.read_metrics(tmp_path)


def test_starting_afresh_removes_old_rows(tmp_path):
    write_steps(tmp_path, [0, 1])
    write_steps(tmp_path, [0])
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [0]


def test_rows_of_one_step_are_merged(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": 1})
        writer.write(1, {"b": 2})
    (row,) = metrics.read_metrics(tmp_path)
    assert (row["a"], row["b"]) == (1, 2)


def test_other_processes_write_nothing(tmp_path):
    write_steps(tmp_path / "run", [1], enabled=False)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps in ((None, [1, 2, 3]), (1, [2, 3, 4])):
        with metrics.MetricsWriter(tmp_path, resume) as writer:
            for step in steps:
                writer.write(step, {"loss/total": step + (0.5 if resume else 0.0)})
                writer.text(step, "rollout/0", "one\ntwo")
    events = EventAccumulator(str(tmp_path / metrics.TENSORBOARD_DIR)).Reload()
    values = {event.step: event.value for event in events.Scalars("loss/total")}
    assert values == {1: 1.0, 2: 2.5, 3: 3.5, 4: 4.5}


def test_a_bucket_gets_whole_files(tmp_path, monkeypatch):
    """A bucket cannot be appended to; resuming must begin with the rows that are there."""
    real = metrics.epath.Path
    monkeypatch.setattr(
        metrics.epath, "Path", lambda path: real(str(path).replace("gs://bucket", str(tmp_path)))
    )
    write_steps("gs://bucket/run", [1, 2, 3])
    write_steps("gs://bucket/run", [3], resume_step=2)
    assert [row["step"] for row in metrics.read_metrics("gs://bucket/run")] == [1, 2, 3]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        metrics.METRICS_FILE,
        metrics.SAMPLES_FILE,
    }
    writer = metrics.MetricsWriter("gs://bucket/run", 3)
    writer.write(4, {"loss/total": 1.0})
    writer.flush()
    assert (tmp_path / "run" / metrics.TENSORBOARD_DIR).exists()
    assert len(metrics.read_metrics("gs://bucket/run")) == 4
    writer.close()


def rollout(group, correct, text, length, finish="eos"):
    return Rollout(
        problem=Problem("p", "q", "a"),
        group=group,
        index=0,
        prompt_tokens=np.zeros(3, np.int32),
        response_tokens=np.zeros(length, np.int32),
        sampler_logp=np.zeros(length, np.float32),
        finish_reason=finish,
        text=text,
        verdict=Verdict(correct, None, "ok"),
    )


def test_rollout_metrics_by_hand():
    batch = [
        rollout(0, True, "wait, wait", 10),
        rollout(0, False, "hmm", 20, "length"),
        rollout(1, False, "unlikely", 30),
        rollout(1, False, "", 40),
        rollout(2, True, "", 50),
        rollout(2, True, "", 50),
    ]
    values = metrics.rollout_metrics(batch)
    assert values["reward/mean"] == 0.5
    assert values["reward/group_solved_frac"] == pytest.approx(2 / 3)
    assert values["reward/group_mixed_frac"] == pytest.approx(1 / 3)
    assert values["rollout/response_len_mean"] == pytest.approx(200 / 6)
    assert values["rollout/response_len_max"] == 50
    assert values["rollout/truncated_frac"] == pytest.approx(1 / 6)
    assert values["epistemic/per_response"] == pytest.approx(4 / 6)
    assert values["epistemic/bounded_per_response"] == pytest.approx(3 / 6)
    assert values["epistemic/per_1k_tokens"] == pytest.approx(20)
    assert values["epistemic/wait"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="empty"):
        metrics.rollout_metrics([])


def test_rollouts_of_all_processes_count(monkeypatch):
    """Catches the numbers of process 0 reported as those of the batch."""
    own = [rollout(0, True, "", 10), rollout(0, False, "", 30)]
    others = metrics._measure([rollout(1, False, "wait", 20), rollout(1, False, "wait", 20)])
    monkeypatch.setattr(metrics.distributed, "allgather_objects", lambda rows: [rows, others])
    values = metrics.rollout_metrics(own)
    assert values["reward/mean"] == 0.25 and values["reward/group_solved_frac"] == 0.5
    assert values["rollout/response_len_mean"] == 20 and values["epistemic/wait"] == 0.5


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(stream, step_times, **kwargs):
    clock = Clock()
    shown = Progress(len(step_times), stream=stream, clock=clock, **kwargs)
    for step, seconds in enumerate(step_times, start=1):
        clock.now += seconds
        shown.update(step, {"reward/mean": 0.5})
    shown.close()
    return shown


def test_log_files_get_plain_lines():
    """Catches carriage returns and escape codes in a log file, and a line per fast step."""
    stream = io.StringIO()
    run_progress(stream, [0.1] * 100, log_every_s=5.0)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("step   1/100  reward 0.500")
    assert lines[-1].startswith("step 100/100")
    assert len(lines) == 3


def test_terminals_get_one_line_rewritten_in_place():
    stream = Terminal()
    run_progress(stream, [1.0] * 5)
    assert stream.getvalue().count("\r") == 5 and stream.getvalue().count("\n") == 1


def test_the_estimate_leaves_out_the_step_that_compiled():
    clock = Clock()
    shown = Progress(10, stream=io.StringIO(), clock=clock)
    assert math.isnan(shown.eta_s())
    for step, now in ((1, 60.0), (2, 62.0), (3, 64.0)):
        clock.now = now
        shown.update(step, {})
    assert shown.eta_s() == pytest.approx(14.0)


def test_notes_stand_on_their_own_line():
    stream = Terminal()
    clock = Clock()
    shown = Progress(2, stream=stream, clock=clock)
    shown.update(1, {})
    shown.note("saved")
    assert stream.getvalue().endswith("\nsaved\n")


def test_seconds_as_people_read_them():
    assert [format_seconds(s) for s in (0.4, 59.6, 343, 3600 * 5 + 60 * 7, math.nan)] == [
        "0s",
        "1m 00s",
        "5m 43s",
        "5h 07m",
        "?",
    ]
