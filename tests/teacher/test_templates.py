"""Templates: literal braces, one pass, presets as published, misspellings caught at the start."""

import pytest

from sdjax.teacher.templates import PRESETS, fill, templates

BOX = "put your final answer within \\boxed{}."


def test_braces_of_latex_stay_and_inserted_text_is_not_filled_again():
    """str.format would die on \\boxed{}, and a chain of replaces would fill a demonstration."""
    texts = templates("{prompt}|{solution}|\\frac{a}{b} \\boxed{}")
    turn = texts.user_turn(prompt="P{solution}", question="Q", solution="S{prompt}{feedback}")
    assert turn == ("P{solution}|\nCorrect solution:\n\nS{prompt}{feedback}|\\frac{a}{b} \\boxed{}")
    assert fill("{{x}} {x}", x="1") == "{1} 1"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_shows_the_question_and_no_placeholder_is_left(name):
    turn = PRESETS[name].user_turn(
        prompt="PROMPT", question="QUESTION", solution="SOL", feedback="FEED", assessment="correct."
    )
    assert "PROMPT" in turn or "QUESTION" in turn
    for placeholder in ("{prompt}", "{question}", "{solution}", "{feedback}", "{assessment}"):
        assert placeholder not in turn
    assert ("SOL" in turn) == (name not in ("concise", "concise_boxed"))


def test_opsd_templates_are_the_published_ones():
    """METHODS 4, newlines included."""
    turn = PRESETS["opsd"].user_turn(prompt="P", question="Q", solution="S")
    assert turn.startswith(
        "Problem: Q\n\nHere is a reference solution to this problem:\n"
        "=== Reference Solution Begin ===\nS\n=== Reference Solution End ===\n\n\nAfter reading"
    )
    assert turn.endswith(f"work out:\n\nPlease reason step by step, and {BOX}")
    turn = PRESETS["opsd_a"].user_turn(prompt="P", question="Q", solution="S")
    assert turn.startswith("Q\n\nHere is a reference solution to this problem:\nS\n\n\nAfter under")
    assert turn.endswith(f"problem below:\n\nPlease reason step by step, and {BOX}")


def test_paper_prompt_reads_as_printed():
    turn = PRESETS["paper"].user_turn(prompt=f"Q\n{BOX}", question="Q", solution="<text>")
    assert turn == (
        f"Q\n{BOX}\nCorrect solution:\n\n<text>\n\nCorrectly solve the original question."
    )


def test_uncertainty_line_replaces_the_last_one():
    turn = PRESETS["hint_uncertainty"].user_turn(prompt="P", question="Q", solution="S")
    assert turn.startswith("P\n\nCorrect solution: S\n\nSolve the original question from scratch")
    assert turn.endswith("include as much uncertainty or ambiguity in the explanation.")


def test_section_overrides():
    texts = templates(
        "paper", solution="[{successful_previous_attempt}]", feedback="<{feedback_raw}>"
    )
    assert texts.user_turn(prompt="P", question="Q", solution="S", feedback="F") == (
        "P[S]<F>\n\nCorrectly solve the original question."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("papre",), "no preset"),
        (("{promt} {prompt}",), "did you mean {prompt}"),
        (("{solution}",), "lacks {prompt} or {question}"),
        (("paper", "no place for it"), "lacks {successful_previous_attempt}"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match="config.teacher.context") as error:
        templates(*arguments)
    assert message in str(error.value)


def test_a_template_written_for_str_format_means_the_same():
    """Templates are copied from verl's YAML, where an empty box is escaped."""
    texts = templates("{prompt}{solution}\n\\boxed{{}}", solution="<{successful_previous_attempt}>")
    assert texts.user_turn(prompt="P", question="Q", solution="S") == "P<S>\n\\boxed{}"
