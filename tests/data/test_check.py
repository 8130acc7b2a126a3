"""mode=check_rewards: which golds fail and why, what overlaps, and the exit status."""

import json
import os

import pytest

from sdjax import config
from sdjax.data import check
from sdjax.data.golds import as_response, check_golds, kinds
from sdjax.records import Problem, Verdict


class Pool:
    """Stands in for the verifier: rewards every gold that is not "bad"."""

    def __init__(self, **_):
        pass

    def score(self, responses, golds):
        return [Verdict(gold != "bad", gold, "equal" if gold != "bad" else "odd") for gold in golds]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


def problems(*golds):
    return [Problem(str(i), f"Q{i}", gold, meta={"row": i}) for i, gold in enumerate(golds)]


def test_golds_are_shown_in_the_form_their_reward_reads():
    assert as_response("\\frac12", "math") == "\\boxed{\\frac12}"
    assert as_response("B", "choice") == "<answer>\nB\n</answer>"
    assert as_response("4", "answer_line") == "Answer: 4"
    calls = '[{"Action": "f", "Action_Input": "{\\"a\\": 1}"}]'
    assert as_response(calls, "tool") == 'Action: f\nAction Input: {"a": 1}'
    assert as_response("{}", "code") is None


def test_a_gold_must_be_rewarded_and_readable():
    """\\frac{1}{0} equals itself as text, yet no response could be right in another form."""
    golds = ("4", "bad", "\\frac{1}{0}", "52_8", "\\text{Evelyn}")
    checks = check_golds(problems(*golds), Pool(), "math")
    assert [c.passed for c in checks] == [True, False, False, True, True]
    assert [c.kind for c in checks[:3]] == ["number", "odd", "undefined"]
    assert kinds(checks)["undefined"] == 1


def test_code_golds_must_hold_tests():
    golds = ('{"inputs": ["1"], "outputs": ["2"]}', '{"inputs": []}', "print(1)")
    checks = check_golds(problems(*golds), Pool(), "code")
    assert [c.kind for c in checks] == ["tests", "unreadable_gold", "unreadable_gold"]


@pytest.mark.parametrize("reward", ["mine.rewards:score", "format_strict"])
def test_golds_of_other_rewards_are_left_alone(reward):
    """A user's reward may want another form than a box: its data set must not come out empty."""

    class Refuses:
        def score(self, responses, golds):
            raise AssertionError("nothing to show it")

    checks = check_golds(problems("4"), Refuses(), reward)
    assert [(c.passed, c.kind) for c in checks] == [(True, "unchecked")]


def run(tmp_path, rows, capsys, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    c = config.base()
    c.mode, c.model.path, c.data.name, c.reward.name = "check_rewards", "", "jsonl", "auto"
    c.data.path, c.eval.sets, c.reward.workers = str(path), (), 1
    c.update_from_flattened_dict(changes)
    status = 0
    try:
        check.run(c, str(tmp_path / "out"))
    except SystemExit as stop:
        status = stop.code
    report = json.loads((tmp_path / "out" / "check_rewards.json").read_text())
    return status, report, capsys.readouterr().out


def test_the_report_names_rows_and_leaves_with_a_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "VerifierPool", Pool)
    rows = [
        {"prompt": "What is 2+2?", "answer": "4"},
        {"prompt": "What is bad?", "answer": "bad"},
        {"prompt": "No gold?"},
    ]
    status, report, printed = run(tmp_path, rows, capsys)
    assert status == 1
    assert (report["problems"], report["passed"]) == (2, 1)
    assert [entry["row"] for entry in report["failing"]] == [1]
    assert report["bad_rows"][0]["row"] == 2
    assert "bad row 2: no answer" in printed and "1 of 2 (50.0%)" in printed
    assert "'bad' (odd)" in printed


def test_overlap_with_named_sets_is_counted(tmp_path, capsys, monkeypatch):
    from sdjax.data.problems import load_set

    monkeypatch.setattr(check, "VerifierPool", Pool)
    leaked = load_set("test", config.base().data, limit=3)[2]
    rows = [
        {"prompt": leaked.prompt, "answer": leaked.answer},
        {"prompt": "What is the capital?", "answer": "Rome"},
    ]
    changes = {"eval.sets": ("test",), "data.synthetic_size": 5}
    status, report, printed = run(tmp_path, rows, capsys, **changes)
    assert status == 0
    assert report["overlap"]["test"]["exact"] == 1
    assert report["overlap"]["test"]["pairs"][0] == {
        "row": 0,
        "held_out_id": leaked.id,
        "kind": "exact",
    }
    assert "overlap with test: 1 exact, 0 near" in printed


def test_a_benchmark_is_recognised_by_its_file(tmp_path):
    c = config.base()
    c.data.name, c.reward.name = "jsonl", "auto"
    c.data.path = str(tmp_path / "tooluse" / "test.json")
    cfg, reward = check.chosen(c)
    assert (cfg.name, cfg.split, reward) == ("toolalpaca", "test", "tool")
    c.reward.name = "math"  # a choice of one's own is kept
    assert check.chosen(c)[1] == "math"


@pytest.mark.skipif(
    not os.environ.get("SDJAX_DATA"), reason="benchmark files: set SDJAX_DATA to their folder"
)
@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500"])
def test_every_gold_of_the_evaluation_sets_verifies_against_itself(name, tmp_path, capsys):
    """The real verifier on the real golds: 100 % or the set is graded wrongly."""
    c = config.base()
    c.mode, c.model.path, c.reward.name, c.eval.sets = "check_rewards", "", "auto", ()
    c.data.name = name
    check.run(c, str(tmp_path))
    report = json.loads((tmp_path / "check_rewards.json").read_text())
    assert report["passed"] == report["problems"] > 0
    assert "100.0%" in capsys.readouterr().out
