"""The public files of the papers, where SDJAX_DATA points to them; else skipped with a reason."""

import os
from collections import Counter

import pytest

from sdjax.data import benchmarks
from sdjax.data.overlap import find_overlap
from sdjax.data.problems import DataConfig, load_problems, load_report
from sdjax.data.prompts import BOXED


@pytest.fixture(autouse=True, scope="module")
def real_files():
    if not os.environ.get("SDJAX_DATA"):
        pytest.skip("benchmark files are not part of the project: set SDJAX_DATA to their folder")


def load(name, **changes):
    return load_report(DataConfig(name=name, **changes))


@pytest.mark.parametrize(
    ("name", "count"), [("aime24", 30), ("aime25", 30), ("amc23", 40), ("math500", 500)]
)
def test_evaluation_sets_are_whole(name, count):
    report = load(name)
    assert len(report.problems) == count and not report.bad_rows and not report.duplicates
    for problem in report.problems:
        assert problem.prompt.endswith(BOXED) and problem.prompt.count("\\boxed{}") == 1
        assert problem.meta["question"] + BOXED == problem.prompt
    if name == "math500":
        assert all("\\boxed" in p.solution for p in report.problems)


def test_coverage_files_are_nested_and_as_large_as_their_names_say():
    ids = {n: [p.id for p in load(f"task_coverage_{n}").problems] for n in benchmarks.COVERAGE}
    assert {n: len(found) for n, found in ids.items()} == {n: n for n in benchmarks.COVERAGE}
    sizes = sorted(ids)
    for small, large in zip(sizes, sizes[1:], strict=False):
        assert set(ids[small]) <= set(ids[large])
    assert load("task_coverage_1", dedupe=False).rows == 64


@pytest.mark.parametrize("subject", benchmarks.SUBJECTS)
def test_sciknoweval_and_its_split(subject):
    """Our 90/10 split of the whole file is the released one, row for row."""
    root = os.environ["SDJAX_DATA"]
    for split in ("train", "test"):
        released = load(f"sciknoweval_{subject}", split=split).problems
        ours = load(
            f"sciknoweval_{subject}", split=split, path=f"{root}/sciknoweval/{subject}.json"
        ).problems
        assert [(p.id, p.prompt, p.answer) for p in ours] == [
            (p.id, p.prompt, p.answer) for p in released
        ]
        assert set(Counter(p.answer for p in ours)) == set("ABCD")
        assert ours[0].meta["history"][0]["role"] == "system"


def test_a_real_leak_between_train_and_test_is_found():
    """One question of the material subject stands on both sides of the released split."""
    train, test = (load("sciknoweval_material", split=s).problems for s in ("train", "test"))
    assert len(find_overlap(train, test).exact) == 1


def test_coverage_questions_that_stand_in_the_evaluation_sets():
    """One is an AMC23 problem in other spelling, one a MATH500 problem with another sign."""
    train = load("task_coverage_512").problems
    found = {
        s: find_overlap(train, load(s).problems) for s in ("aime24", "aime25", "amc23", "math500")
    }
    assert {name: (len(o.exact), len(o.near)) for name, o in found.items()} == {
        "aime24": (0, 0),
        "aime25": (0, 0),
        "amc23": (0, 1),
        "math500": (0, 1),
    }


def test_toolalpaca_golds_are_calls():
    problems = load("toolalpaca", split="test").problems
    assert len(problems) == 68 and all('"Action"' in p.answer for p in problems)


def test_both_prompt_styles_of_a_real_file():
    boxed, plain = (
        load_problems(DataConfig(name="aime24", prompt_style=style))
        for style in ("boxed", "answer_line")
    )
    assert plain[0].prompt.endswith('after "Answer:".') and "boxed" not in plain[0].prompt
    assert boxed[0].meta["question"] == plain[0].meta["question"]
