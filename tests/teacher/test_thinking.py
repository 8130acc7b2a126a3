"""Think removal: the references' regular expressions define the result, ours must not be slower."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.teacher.thinking import strip_analysis, strip_sdpo, strip_trl

PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", " ", "\n", "\u00a0", "\x1c", "a", "b\n", "<", "think>"])
)


@settings(max_examples=300, deadline=None)
@given(PIECES)
def test_same_as_the_regular_expressions(pieces):
    """Catches a search that skips a nested tag, eats too few blanks or strips an open block."""
    text = "".join(pieces)
    sdpo = re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    assert strip_sdpo(text) == sdpo
    assert strip_analysis(text) == re.sub(r"^.*?</think>\s*", "", sdpo, flags=re.DOTALL)
    assert strip_trl(text) == re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def test_a_template_that_opens_think_in_the_prompt():
    """DeepSeek's response starts inside the block: SDPO's version would show all its thinking."""
    response = "so 2 and 2 is 4, wait, yes\n</think>\n\nThe answer is \\boxed{4}."
    assert strip_analysis(response) == "The answer is \\boxed{4}."
    assert strip_sdpo(response) == response


def test_ten_thousand_unclosed_blocks_are_linear():
    """The references' regular expression takes minutes on this; a response under RL can hold it."""
    text = "<think>" * 200_000
    assert strip_analysis(text) == text
