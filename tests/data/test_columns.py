"""Rows of any shape become problems; rows that cannot are named with index and reason."""

import dataclasses
import json
from decimal import Decimal

import pytest

from sdjax.data.columns import Columns, RowError, as_text, lookup, read_row
from sdjax.data.problems import DataConfig, load_problems, load_report, training_problems
from sdjax.records import Verdict


def row(**fields):
    return read_row(fields, 3, Columns(), "as_is")


def test_the_usual_names_are_found():
    problem = row(question="Q?", answer=" 4 ", solution="because", id=17)
    assert (problem.prompt, problem.answer, problem.solution) == ("Q?", " 4 ", "because")
    assert (problem.id, problem.meta["row"]) == ("17", 3)
    assert row(problem="Q?", ground_truth="4").id == "3"  # no id: the row's index


def test_verl_rows_as_structs_and_as_json_text():
    """AIME24 holds structs, AIME25 the same as JSON strings: one reader for both."""
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}]
    reward = {"ground_truth": "4", "style": "rule"}
    extra = {"index": 0, "raw_problem": "Q?"}
    as_struct = row(prompt=chat, reward_model=reward, extra_info=extra)
    as_json = row(
        prompt=json.dumps(chat), reward_model=json.dumps(reward), extra_info=json.dumps(extra)
    )
    assert as_struct == as_json
    assert as_struct.id == "0"  # zero is an id, not a missing one
    assert as_struct.meta["history"] == chat[:1]


def test_messages_in_parts_are_joined(tmp_path):
    """Chats of multimodal sets hold lists, which once broke the search for duplicates."""
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    image = [{"type": "image", "image": "x.png"}]
    rows = [
        {"prompt": [{"role": "user", "content": content}], "answer": "2"}
        for content in (parts, parts, image)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    report = load_report(DataConfig(name="jsonl", path=str(path)))
    assert [p.prompt for p in report.problems] == ["What is 1+1?"] and report.duplicates == 1
    assert [(b.index, "text" in b.reason) for b in report.bad_rows] == [(2, True)]


def test_system_column_becomes_the_first_message():
    assert row(prompt="Q?", answer="B", system="Choose.").meta["history"] == [
        {"role": "system", "content": "Choose."}
    ]
    assert "history" not in row(prompt="Q?", answer="B", system=None).meta


def test_named_columns_with_dotted_paths():
    columns = Columns(prompt="task.text", answer="task.gold", solution="why")
    problem = read_row({"task": {"text": "Q?", "gold": 4.0}, "why": "w"}, 0, columns, "bare")
    assert (problem.prompt, problem.answer, problem.solution) == ("Q?", "4", "w")
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1  # a column whose name has a dot


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1/2", "1/2"),
        (3.0, "3"),
        (2.5, "2.5"),
        (7, "7"),
        ([1, 2], "[1, 2]"),
        (Decimal("2.50"), "2.50"),
    ],
)
def test_golds_as_text(value, text):
    """AMC23 keeps its golds as floats: "27.0" would never equal a model's 27 by its text."""
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Q?"}, "no answer"),
        ({"prompt": "Q?", "answer": None}, "no answer"),
        ({"prompt": "Q?", "answer": float("nan")}, "no answer"),
        ({"prompt": "Q?", "answer": "  "}, "answer is empty"),
        ({"prompt": " \n", "answer": "4"}, "prompt is empty"),
        ({"answer": "4"}, "config.data.columns.prompt"),
        ({"prompt": 5, "answer": "4"}, "neither text nor chat"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "4"}, "ends with role"),
    ],
)
def test_bad_rows_say_why(fields, message):
    with pytest.raises(RowError, match=message):
        row(**fields)


def test_a_missing_named_column_lists_what_there_is():
    with pytest.raises(RowError, match=r"no column 'gold' \(config.data.columns.answer\).*answer"):
        read_row({"prompt": "Q", "answer": "4"}, 0, Columns(answer="gold"), "as_is")


ROWS = [
    {"prompt": "What is 1+1?", "answer": "2"},
    {"prompt": "", "answer": "2"},
    {"prompt": "What is 2+2?", "answer": "4"},
    {"prompt": "what is  1+1?\n", "answer": "2"},
    {"prompt": "What is 3+3?"},
    {"prompt": "What is 4+4?", "answer": 8},
]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n", encoding="utf-8")
    return str(path)


def test_bad_rows_are_skipped_with_their_index_and_duplicates_counted(jsonl):
    report = load_report(DataConfig(name="jsonl", path=jsonl))
    assert [p.prompt for p in report.problems] == [ROWS[i]["prompt"] for i in (0, 2, 5)]
    assert [bad.index for bad in report.bad_rows] == [1, 4]
    assert (report.rows, report.duplicates) == (6, 1)
    assert len(load_problems(DataConfig(name="jsonl", path=jsonl, dedupe=False))) == 4
    assert len(load_problems(DataConfig(name="jsonl", path=jsonl, limit=2))) == 2


def test_bad_rows_can_refuse_the_source(jsonl):
    with pytest.raises(ValueError, match=r"row 1 of .* \(and 1 more\).*prompt is empty"):
        load_problems(DataConfig(name="jsonl", path=jsonl, on_bad_row="refuse"))


def test_literal_copies_are_dropped_before_they_are_parsed(tmp_path):
    """DAPO-Math's file has a hundred copies of each row; a near copy is still found later."""
    path = tmp_path / "rows.jsonl"
    copies = [ROWS[0]] * 100 + [ROWS[2]] * 100 + [ROWS[3]]
    path.write_text("\n".join(map(json.dumps, copies)), encoding="utf-8")
    report = load_report(DataConfig(name="jsonl", path=str(path)))
    assert (len(report.problems), report.duplicates) == (2, 199)


def test_a_source_without_any_good_row_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Q"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"no usable problem out of 1 rows; row 0: no prompt"):
        load_problems(DataConfig(name="jsonl", path=str(path)))


class Pool:
    """Stands in for the verifier: rewards every gold but 2."""

    def score(self, responses, golds):
        return [Verdict(gold != "2", gold, "different") for gold in golds]


def test_golds_are_checked_when_a_verifier_is_given(jsonl):
    """An unparsable gold is reported with its row and never rewarded."""
    report = load_report(DataConfig(name="jsonl", path=jsonl), pool=Pool())
    assert [p.answer for p in report.problems] == ["4", "8"]
    assert [bad.index for bad in report.bad_rows] == [0, 1, 4]
    assert "the gold '2' fails: different" in report.bad_rows[0].reason


def test_training_problems_are_checked_and_screened(jsonl, caplog):
    from sdjax import config

    c = config.base()
    c.data.name, c.data.path, c.data.on_overlap = "jsonl", jsonl, "drop"
    held_out = {"train": load_problems(c.data), "mine": load_problems(c.data)[2:]}
    held_out["bad"] = [
        dataclasses.replace(load_problems(c.data)[0], prompt="New?", meta={"row": 7})
    ]
    kept = training_problems(c, None, Pool(), held_out)
    assert "1 of 1 golds of evaluation set bad fail their verifier: row 7 ('2'" in caplog.text
    assert [p.answer for p in kept] == ["4"]  # "2" fails its verifier, "8" stands in "mine"
    assert "evaluation set mine" in caplog.text and "set train" not in caplog.text
    c.eval.sets = ("sciknoweval_physics",)  # letters in <answer>, which no box would ever match
    training_problems(c, None, Pool(), {})
    assert "sciknoweval_physics are written for config.reward.name=choice" in caplog.text
