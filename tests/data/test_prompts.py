"""Prompt styles: the paper's rewriting to the character; styles convert into each other."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.data import prompts
from sdjax.records import Problem

HEAD, TAIL, BOXED = prompts.ANSWER_HEAD, prompts.ANSWER_TAIL, prompts.BOXED


def test_dapo_rewrite_equals_the_released_script(shared_dir):
    path = shared_dir / "fixtures" / "text_dapo_prompt_rewrite.json"
    for case in json.loads(path.read_text()):
        out = [{"content": prompts.dapo_to_boxed(case["input"]), "role": "user"}]
        assert out == case["out"]
        assert prompts.styled(case["input"], "boxed") == case["out"][0]["content"]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (HEAD + "Q?" + TAIL, "Q?"),
        (HEAD.strip() + " Q?" + TAIL, "Q?"),  # one space instead of blank lines
        (HEAD + "Q?" + TAIL[:-1] + "\n", "Q?"),  # no full stop, a newline at the end
        (HEAD + "Q?", "Q?"),
        ("Q?" + TAIL, "Q?"),
        ("  Q?\n", "Q?"),
        ("First. " + HEAD + "Q?", ("First. " + HEAD + "Q?").strip()),  # only at the start
        (TAIL.strip() + " is what I say. Q?", TAIL.strip() + " is what I say. Q?"),
    ],
)
def test_answer_line_instructions_are_taken_off(text, question):
    """As the script's two anchored expressions: the head at the start, the tail at the end only."""
    assert prompts.strip_answer_line(text) == question
    assert prompts.dapo_to_boxed(text) == question + BOXED


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.sampled_from(["bare", "boxed", "answer_line"]),
    st.sampled_from(["bare", "boxed", "answer_line"]),
)
def test_styles_convert_without_piling_up(question, first, second):
    """A benchmark file that is already boxed must not get the instruction twice."""
    question = prompts.bare(question)
    once = prompts.styled(question, first)
    assert prompts.bare(once) == question
    assert prompts.styled(once, second) == prompts.styled(question, second)


def test_answer_line_is_the_original_dapo_prompt():
    assert prompts.styled("What is 1+1?", "answer_line") == (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "Answer:".'
    )


def test_opsd_style_is_the_published_student_prompt():
    assert prompts.styled("Q?" + BOXED, "opsd") == (
        "Problem: Q?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_as_is_leaves_everything_and_unknown_styles_are_refused():
    assert prompts.styled(" x \n", "as_is") == " x \n"
    with pytest.raises(ValueError, match="as_is, bare, boxed"):
        prompts.styled("x", "fancy")


def test_messages_of_a_problem():
    history = [{"role": "system", "content": "S"}]
    problem = Problem("1", "Q", "A", meta={"history": history})
    messages = prompts.problem_messages(problem)
    assert messages == [*history, {"role": "user", "content": "Q"}]
    messages.append("changed")
    assert problem.meta["history"] == history  # the record must not be changed through the list
