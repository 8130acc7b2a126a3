"""LiveCodeBench rows: packed tests are unpacked, and a pickle in a data file cannot run code."""

import base64
import json
import os
import pickle
import zlib

import pytest

from sdjax.data.columns import RowError
from sdjax.data.problems import DataConfig, load_report

PUBLIC = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PRIVATE = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(**changes):
    return {
        "question_id": "abc_1",
        "question_content": "Add two numbers.",
        "starter_code": "",
        "public_test_cases": json.dumps(PUBLIC),
        "private_test_cases": packed(json.dumps(PRIVATE)),
        "metadata": "{}",
        "contest_date": "2025-03-01T00:00:00",
        **changes,
    }


def load(tmp_path, *rows):
    path = tmp_path / "test6.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_report(DataConfig(name="livecodebench_v6", path=str(path)))


def test_all_tests_go_into_the_gold(tmp_path):
    problem = load(tmp_path, row()).problems[0]
    assert problem.id == "abc_1" and problem.meta["date"].startswith("2025-03")
    assert json.loads(problem.answer) == {
        "inputs": ["1 2\n", "5 6\n"],
        "outputs": ["3\n", "11\n"],
        "fn_name": None,  # an empty name would be taken for a function to call
    }
    assert "Add two numbers." in problem.prompt and "stdin" in problem.prompt


def test_starter_code_and_function_name(tmp_path):
    starter = "class Solution:\n    def add(self, a, b):"
    changed = row(starter_code=starter, metadata=json.dumps({"func_name": "add"}))
    problem = load(tmp_path, changed).problems[0]
    assert starter in problem.prompt
    assert json.loads(problem.answer)["fn_name"] == "add"


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/sdjax_pickle_ran",)


def test_a_pickle_that_would_run_code_is_a_bad_row(tmp_path):
    """The release packs tests as a pickle: pickle.loads on a downloaded file is code execution."""
    report = load(
        tmp_path, row(), row(question_content="Other.", private_test_cases=packed(Payload()))
    )
    assert [bad.index for bad in report.bad_rows] == [1]
    assert "refused to load" in report.bad_rows[0].reason
    assert not os.path.exists("/tmp/sdjax_pickle_ran")


@pytest.mark.parametrize("garbage", ["not base64!", base64.b64encode(b"plain").decode()])
def test_unreadable_tests_are_a_bad_row(tmp_path, garbage):
    report = load(tmp_path, row(), row(question_content="Other.", private_test_cases=garbage))
    assert "cannot be unpacked" in report.bad_rows[0].reason
    assert issubclass(RowError, ValueError)


def test_the_golds_are_what_the_code_reward_runs(tmp_path):
    """Adapter and verifier must agree on the shape, or every program would be wrong."""
    from sdjax.rewards.code import read_tests

    tests = read_tests(load(tmp_path, row()).problems[0].answer)
    assert (tests.inputs, tests.outputs, tests.function) == (
        ["1 2\n", "5 6\n"],
        ["3\n", "11\n"],
        None,
    )
    changed = row(starter_code="class S", metadata={"func_name": "add"})
    assert read_tests(load(tmp_path, changed).problems[0].answer).function == "add"
