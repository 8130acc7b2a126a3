"""mode=analyze from files alone."""

import json

import pytest

from sdjax import config
from sdjax.analysis import report


def write_responses(path, texts):
    path.write_text("".join(json.dumps({"response": text}) + "\n" for text in texts))
    return str(path)


def analysis(tmp_path, kind, **fields):
    c = config.base()
    c.mode, c.analysis.kind = "analyze", kind
    c.analysis.update(fields)
    config.check(c)
    report.run(c, str(tmp_path / "out"))
    return tmp_path / "out"


def test_word_shift_from_files_of_responses(tmp_path):
    base = write_responses(tmp_path / "base.jsonl", ["wait the sum", "wait the"])
    model = write_responses(tmp_path / "model.jsonl", ["the sum", "the sum"])
    out = analysis(tmp_path, "word_shift", base=base, responses=(model,), min_count=1)
    assert "wait -1.00" in (out / "word_shift.md").read_text()


def test_judge_prompts_then_replies(tmp_path):
    responses = write_responses(tmp_path / "r.jsonl", ["wait", "fine"])
    out = analysis(tmp_path, "judge", responses=(responses,))
    assert len((out / "judge_prompts.jsonl").read_text().splitlines()) == 2
    replies = tmp_path / "replies.jsonl"
    rows = [{"id": 0, "reply": '{"count": 3}'}, {"id": 1, "reply": "none"}]
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = analysis(tmp_path, "judge", judge_replies=str(replies))
    assert (out / "judge.md").read_text().splitlines()[2].split() == "| 1 | 3.00 | 1 |".split()


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("word_shift", "config.analysis.base"),
        ("judge", "config.analysis.responses"),
        ("compare", "config.analysis.workdirs"),
        ("report", "the workdir of a run"),
    ],
)
def test_what_is_missing_is_named(tmp_path, kind, field):
    with pytest.raises(ValueError, match=field):
        analysis(tmp_path, kind)
