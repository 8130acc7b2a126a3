"""Train/eval overlap: exact and by shared runs of words, without the instructions around."""

from hypothesis import given
from hypothesis import strategies as st

from sdjax.data.overlap import find_overlap, ngrams, normal_text, without_overlap, words
from sdjax.data.prompts import BOXED
from sdjax.records import Problem

LONG = "Find the number of ways in which seven red and five blue balls can be put in a row so that"


def problems(*questions):
    return [Problem(id=str(i), prompt=q + BOXED, answer="1") for i, q in enumerate(questions)]


def test_exact_near_and_none():
    train = problems(
        "What is  1+1?", LONG + " no two reds touch.", "Something else entirely?", LONG.upper()
    )
    held_out = problems("what is 1+1?", LONG + " all blues touch.")
    found = find_overlap(train, held_out)
    assert found.exact == {0: "0"}
    assert found.near == {1: "1", 3: "1"}


def test_the_instruction_alone_is_no_overlap():
    """The boxed sentence has 14 words: unstripped, every pair of problems would overlap."""
    assert len(words(BOXED)) > 13
    assert not find_overlap(problems("What is 7+7?"), problems("Name a prime.")).positions


def test_numbers_and_signs_count_as_words():
    """x^2-3x+2 and x^2-5x+6 are different problems though their letters agree."""
    train = problems("Solve $x^2 - 3x + 2 = 0$ for x over the reals.")
    held_out = problems("Solve $x^2 - 5x + 6 = 0$ for x over the reals.")
    assert not find_overlap(train, held_out).positions


def test_removal_and_counts():
    train = problems("What is 1+1?", "What is 2+2?", "What is 3+3?")
    sets = {"a": problems("What is 1+1?"), "b": problems("what is 3+3?")}
    kept, found = without_overlap(train, sets)
    assert [p.id for p in kept] == ["1"]
    assert (len(found["a"].exact), len(found["b"].exact)) == (1, 1)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 8))
def test_ngrams_are_all_runs_of_n_words(tokens, n):
    runs = list(ngrams(" ".join(tokens), n))
    if len(tokens) < n:
        assert runs == [tuple(tokens)]
    else:
        assert runs == [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def test_normal_text():
    assert normal_text("  A\n\tb  C ") == "a b c"
