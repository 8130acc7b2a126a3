"""Where the answer is found, and that nothing outside the box ever counts."""

import pytest

from sdjax.rewards.extract import answer_line, boxed_answer, last_box, tagged
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.quick import plain_value, quick_equal


@pytest.mark.parametrize(
    ("text", "content", "reason"),
    [
        (r"a \boxed{1} b \boxed{2} c", "2", "ok"),
        (r"\boxed {3}", "3", "ok"),
        (r"\boxed{\boxed{4}}", "4", "ok"),
        (r"\boxed{\{1\}}", r"\{1\}", "ok"),
        (r"\boxed{1\\}", "1\\\\", "ok"),
        (r"\boxed{1} then \boxed{2", None, "unclosed_box"),
        (r"\boxed{1\}", None, "unclosed_box"),
        (r"\boxed{1} put it in \boxed{}", None, "empty_box"),
        (r"\boxed{1} use \boxed please", "1", "ok"),
        (r"\boxed(1)", None, "no_box"),
        (r"answer 1", None, "no_box"),
    ],
)
def test_last_box(text, content, reason):
    """Catches a fallback to an earlier box, and escaped braces counted as braces."""
    assert last_box(text) == (content, reason)


def test_box_in_unclosed_think_is_a_choice():
    """A response cut off inside its reasoning has not answered, unless the config says so."""
    text = r"<think>maybe \boxed{5}"
    assert boxed_answer(text) == (None, "unclosed_think")
    assert boxed_answer(text, RewardConfig(box_in_unclosed_think=True)) == ("5", "ok")
    assert boxed_answer(r"<think>\boxed{4}</think>\boxed{5}") == ("5", "ok")


def test_tag_and_line():
    """The last tag and the last line count."""
    assert tagged("<answer>A</answer> <answer>B</answer>", "answer") == "B"
    assert tagged("<answer>A", "answer") is None
    assert answer_line("Answer: 3\nso\n**Answer:** $4$") == "$4$"
    assert answer_line("no") is None


@pytest.mark.parametrize(
    ("answer", "gold", "decided"),
    [
        ("1 1/2", "11/2", None),
        ("x + 1", "x+1", True),
        ("0.50", ".5", None),
        ("0.50", "0.5", True),
        ("1 2", "12", None),
        ("9007199254740993", "9007199254740992", False),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        (r"\frac{1}{0}", "1", None),
    ],
)
def test_quick_equal(answer, gold, decided):
    """Blanks between digits must not join them, and large integers must not become floats."""
    assert quick_equal(answer, gold) is decided


def test_plain_value_is_ascii():
    """Full-width digits are not numbers here, although int() would read them."""
    assert plain_value("４２") is None
