"""Train/eval overlap: exact and by shared runs of words, without the instructions around."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.data.overlap import find_overlap, ngrams, normal_text, screened, words
from sdjax.data.prompts import BOXED
from sdjax.records import Problem

LONG = (
    "Find the number of ways in which seven red balls, five blue balls and two green balls can be "
    "put in a row so that"
)


def problems(*questions):
    return [Problem(id=str(i), prompt=q + BOXED, answer="1") for i, q in enumerate(questions)]


def test_exact_near_and_none():
    train = problems(
        "What is  1 + 1?", LONG + " no two reds touch.", "Something else entirely?", LONG.upper()
    )
    held_out = problems("what is 1+1?", LONG + " all blues touch.")
    found = find_overlap(train, held_out)
    assert found.exact == {0: "0"}
    assert found.near == {1: "1", 3: "1"}


def test_spelling_of_formulas_does_not_hide_a_leak():
    """AMC23's $d(A,B)$ is $d(A, B)$ in DAPO-Math: the same question all the same."""
    assert find_overlap(problems("Find $d(A, B)$."), problems("Find $d(A,B)$.")).exact


def test_the_instruction_alone_is_no_overlap():
    """Unstripped, two short questions would share the words of the boxed sentence."""
    assert len(words(BOXED)) == 12
    assert not find_overlap(problems("What is 7+7?"), problems("Name a prime."), 12).positions


def test_phrases_of_competitions_are_no_overlap():
    """With GPT-3's 13 words a tenth of the coverage questions would be said to stand in AIME."""
    phrase = "can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive "
    phrase += "integers. Find $m+n$."
    train = problems(f"The probability that a die shows a six {phrase}")
    held_out = problems(f"The area of the smaller triangle {phrase}")
    assert find_overlap(train, held_out, 13).near
    assert not find_overlap(train, held_out).positions


def test_numbers_count_as_words():
    """x^2-3x+2 and x^2-5x+6 are different problems though all other words agree."""
    tail = " = 0$ for x over the reals, and give the sum of all of its solutions as a number."
    train = problems("Solve $x^2 - 3x + 2" + tail)
    held_out = problems("Solve $x^2 - 5x + 6" + tail)
    assert not find_overlap(train, held_out).positions


def test_screening_counts_and_drops_on_request(caplog):
    train = problems("What is 1+1?", "What is 2+2?", "What is 3+3?")
    sets = {"a": problems("What is 1+1?"), "b": problems("what is 3+3?"), "c": problems("Else?")}
    assert screened(train, sets, 20, drop=False) == train
    assert [p.id for p in screened(train, sets, 20, drop=True)] == ["1"]
    assert "1 training questions stand in evaluation set a (1 exactly, 0 share" in caplog.text
    assert "set c" not in caplog.text
    with pytest.raises(ValueError, match="every training question"):
        screened(train, {"a": train}, 20, drop=True)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 8))
def test_ngrams_are_all_runs_of_n_words(tokens, n):
    runs = list(ngrams(" ".join(tokens), n))
    assert runs == [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def test_normal_text():
    assert normal_text("  A\n\tb  C ") == "a b c"
