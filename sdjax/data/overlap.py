"""Contamination: which training problems also stand in an evaluation set, exactly or nearly.

Two signals, counted apart: the same question after normalisation, and a shared run of n words.
Instructions around the question are taken off first, or every pair would share them. Does not
remove anything by itself; `without_overlap` does when asked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from sdjax.data.prompts import question_of
from sdjax.records import Problem

_WORD = re.compile(r"[^\W_]+|\S")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Training problems (by position) that occur in one evaluation set."""

    exact: dict[int, str]  # training position -> id of the evaluation problem
    near: dict[int, str]  # the same for a shared run of words, without the exact ones

    @property
    def positions(self) -> set[int]:
        """All training positions concerned."""
        return set(self.exact) | set(self.near)


def normal_text(text: str) -> str:
    """Text with case folded and every run of blanks as one space."""
    return " ".join(text.split()).casefold()


def words(text: str) -> list[str]:
    """Words and signs of a text, case folded; signs count, or formulas would all look alike."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words; a text shorter than n words is one run of its own."""
    found = words(text)
    if 0 < len(found) < n:
        yield tuple(found)
    for start in range(len(found) - n + 1):
        yield tuple(found[start : start + n])


def find_overlap(train: Sequence[Problem], held_out: Sequence[Problem], n: int = 13) -> Overlap:
    """Training problems whose question equals one of `held_out` or shares n words in a row.

    13 words are the usual choice since GPT-3 (https://arxiv.org/abs/2005.14165, App. C).
    """
    whole = {normal_text(question_of(p)): p.id for p in held_out}
    runs = {run: p.id for p in held_out for run in ngrams(question_of(p), n)}
    exact, near = {}, {}
    for position, problem in enumerate(train):
        question = question_of(problem)
        if (same := whole.get(normal_text(question))) is not None:
            exact[position] = same
            continue
        shared = next((runs[run] for run in ngrams(question, n) if run in runs), None)
        if shared is not None:
            near[position] = shared
    return Overlap(exact, near)


def without_overlap(
    train: Sequence[Problem], sets: Mapping[str, Sequence[Problem]], n: int = 13
) -> tuple[list[Problem], dict[str, Overlap]]:
    """The training problems that stand in no evaluation set, and what was found in each set."""
    found = {name: find_overlap(train, held_out, n) for name, held_out in sets.items()}
    bad = set().union(*(overlap.positions for overlap in found.values()))
    return [p for i, p in enumerate(train) if i not in bad], found
