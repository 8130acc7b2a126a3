"""Reports are made from metrics.jsonl and config.json alone, and say what those say."""

import json

import numpy as np
import pytest

from sdjax.analysis import compare, report, tables
from sdjax.analysis.runs import Run
from sdjax.metrics import MetricsWriter

STEPS = 20


def write_run(workdir, method="SDPO", seed=0, sets=("test", "ood_steps"), shift=0.0, lr=1e-5):
    """A run whose score on `test` is best at step 10 and whose length falls."""
    coefs = {"GRPO": (1.0, 0.0), "SDPO": (0.0, 1.0)}[method]
    config = {
        "seed": seed,
        "model": {"path": "tiny"},
        "objective": {"pg_coef": coefs[0], "distill_coef": coefs[1]},
        "optimizer": {"lr": lr},
        "eval": {"sets": list(sets)},
    }
    with MetricsWriter(workdir, tensorboard=False) as writer:
        (workdir / "config.json").write_text(json.dumps(config))
        for step in range(STEPS + 1):
            if step:
                train = {"reward/mean": 0.4 + step / 100, "rollout/response_len_mean": 90 - step}
                train |= {"epistemic/per_response": 3 - step / 10, "loss/total": 0.1 / step}
                writer.write(step, train | {"epistemic/per_1k_tokens": 33.0 - step})
            if step % 5 == 0:
                writer.write(step, evaluation(step, sets, shift + 0.01 * seed))
    return workdir


def evaluation(step, sets, shift):
    row = {}
    for index, name in enumerate(sets):
        score = 0.5 - 0.2 * index + shift + 0.01 * (10 - abs(step - 10))
        row |= {
            f"eval/{name}/avg@4": score,
            f"eval/{name}/pass@4": score + 0.2,
            f"eval/{name}/response_len_mean": 100.0 - step,
            f"eval/{name}/truncated_frac": 0.05,
            f"eval/{name}/epistemic_per_response": 3.0 - step / 10,
            f"eval/{name}/epistemic_per_1k_tokens": 30.0 - step / 2,
        }
    return row


def test_report_shows_start_best_and_final(tmp_path):
    path = report.write_report(write_run(tmp_path))
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert "start (step 0) | best (step 10) | final (step 20)" in text
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "`test`", "score (avg@4)", "0.500", "0.600", "0.500", ""] in cells
    assert ["", "`ood_steps`", "pass@4", "0.500", "0.600", "0.500", ""] in cells
    assert ["", "`test`", "response length (tokens)", "100.0", "90.0", "80.0", ""] in cells
    assert ["", "reward", "0.430", "0.580", ""] in cells
    for name in ("score_length.png", "epistemic.png"):
        assert f"({name})" in text and (tmp_path / name).stat().st_size > 10_000


def test_report_weighs_divergence_by_tokens(tmp_path):
    """Catches a mean over steps in place of one over tokens."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, (value, tokens) in enumerate([(1.0, 1), (2.0, 3), (0.0, 0)], start=1):
            row = {"distill/divergence_word_wait": value, "distill/tokens_word_wait": tokens}
            writer.write(step, row | {"distill/divergence": 0.5})
    text = report.write_report(tmp_path).read_text()
    assert "| wait |      4 |            1.7500 |                        3.5x |" in text
    assert "hmm" not in text


def test_report_of_a_run_without_config_or_evaluation(tmp_path):
    """Catches a report that only works on finished runs."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": 0.5, "loss/total": float("nan")})
    text = report.write_report(tmp_path).read_text()
    assert "| reward" in text and "## Evaluation" not in text


def test_a_folder_without_metrics_is_told_plainly(tmp_path):
    with pytest.raises(ValueError, match="is .* the workdir of a run"):
        report.write_report(tmp_path)


def test_the_first_configured_set_leads_whatever_was_written_first(tmp_path):
    write_run(tmp_path, sets=("b", "a"))
    run = Run.read(tmp_path)
    assert list(run.scores) == ["b", "a"] and run.scores["a"] == "eval/a/avg@4"


def test_comparison_groups_seeds_and_gives_mean_and_spread(tmp_path):
    dirs = [write_run(tmp_path / f"s{seed}", "SDPO", seed) for seed in range(3)]
    dirs += [write_run(tmp_path / f"g{seed}", "GRPO", seed, shift=0.2) for seed in range(3)]
    text = compare.compare(dirs, tmp_path / "out").read_text()
    assert "SDPO: 3 seeds, 20 steps; GRPO: 3 seeds, 20 steps" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    sdpo = next(row for row in rows if row and row[0] == "SDPO")
    assert sdpo[1:5] == ["0.510 ± 0.010", "0.510 ± 0.010", "0.000 ± 0.000", "80.0 ± 0.0"]
    assert any(row and row[0] == "base model" and row[1] == "0.510 ± 0.010" for row in rows)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_runs_of_one_method_are_told_apart_by_their_fields(tmp_path):
    """Catches seeds of different settings averaged into one number."""
    dirs = [write_run(tmp_path / "a", lr=1e-5), write_run(tmp_path / "b", lr=1e-6)]
    text = compare.compare(dirs, tmp_path / "out").read_text()
    assert "SDPO, optimizer.lr=1e-06: 1 seed," in text and "SDPO, optimizer.lr=1e-05" in text
    named = compare.compare({"high": dirs[:1], "low": dirs[1:]}, tmp_path / "out").read_text()
    assert "high: 1 seed," in named


def test_comparing_nothing_or_strangers_is_told_plainly(tmp_path):
    with pytest.raises(ValueError, match="config.analysis.workdirs"):
        compare.compare([], tmp_path)
    dirs = [write_run(tmp_path / "a", sets=("x",)), write_run(tmp_path / "b", sets=("y",))]
    with pytest.raises(ValueError, match="share no evaluation set"):
        compare.compare(dirs, tmp_path / "out")


def test_tables_escape_bars_and_show_missing_numbers():
    text = tables.markdown(["a", "b"], [["x|y", tables.number(np.nan)]])
    assert "x\\|y" in text and text.splitlines()[2].endswith("- |")
    assert tables.mean_and_spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    with pytest.raises(ValueError, match="1 cells under 2"):
        tables.markdown(["a", "b"], [["x"]])


def test_evaluation_table_has_a_row_per_set():
    text = tables.evaluation(evaluation(0, ("test", "ood_steps"), 0.0) | {"loss/total": 1.0})
    assert "| test      | 0.500 |" in text and "| ood_steps | 0.300 |" in text
    assert text.splitlines()[0].startswith("| set       | avg@4 | ± (se) | pass@4 | tokens")
