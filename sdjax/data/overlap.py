"""Contamination: which training problems also stand in an evaluation set, exactly or nearly.

Two signals, counted apart: the same question after normalisation, and a shared run of n words.
Instructions around the question are taken off first, or every pair would share them.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence

from sdjax.data.prompts import question_of
from sdjax.records import Problem

log = logging.getLogger(__name__)
_WORD = re.compile(r"[^\W_]+")


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
    """Words and numbers of a text, case folded; signs and LaTeX punctuation are left out."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words; none for a shorter text, which only counts when it is equal."""
    found = words(text)
    for start in range(len(found) - n + 1):
        yield tuple(found[start : start + n])


def find_overlap(train: Sequence[Problem], held_out: Sequence[Problem], n: int = 20) -> Overlap:
    """Training problems whose question equals one of `held_out` or shares n words in a row.

    Twenty words rather than the thirteen of GPT-3 (https://arxiv.org/abs/2005.14165, App. C):
    competition problems share longer phrases than that ("where m and n are relatively prime
    positive integers, find m + n"). Blanks do not count in the comparison of whole questions.
    """
    whole = {_blankless(question_of(p)): p.id for p in held_out}
    runs = {run: p.id for p in held_out for run in ngrams(question_of(p), n)}
    exact, near = {}, {}
    for position, problem in enumerate(train):
        question = question_of(problem)
        if (same := whole.get(_blankless(question))) is not None:
            exact[position] = same
            continue
        shared = next((runs[run] for run in ngrams(question, n) if run in runs), None)
        if shared is not None:
            near[position] = shared
    return Overlap(exact, near)


def screened(
    train: list[Problem], sets: Mapping[str, Sequence[Problem]], n: int, drop: bool
) -> list[Problem]:
    """The training problems, counted against every evaluation set and, with `drop`, rid of those
    that stand in one. Raises ValueError when none would be left."""
    found = {name: find_overlap(train, held_out, n) for name, held_out in sets.items()}
    for name, overlap in found.items():
        if overlap.positions:
            log.warning(
                "%d training questions stand in evaluation set %s (%d exactly, %d share %d words "
                "in a row): %s",
                len(overlap.positions),
                name,
                len(overlap.exact),
                len(overlap.near),
                n,
                "dropped" if drop else "kept; config.data.on_overlap=drop removes them",
            )
    if not drop:
        return train
    bad = set().union(*(overlap.positions for overlap in found.values()))
    kept = [p for i, p in enumerate(train) if i not in bad]
    if not kept:
        raise ValueError(
            "every training question stands in an evaluation set: change config.eval.sets, or set "
            "config.data.on_overlap=report"
        )
    return kept


def _blankless(text: str) -> str:
    return "".join(text.split()).casefold()
