"""How training shifted the frequency of each word (appendix B.4 of the paper).

  mu_m(w) = occurrences of w per response of model m,   delta_m(w) = mu_m(w) - mu_base(w)

Words are runs of the letters a to z after lower-casing; the vocabulary is the base model's. The
paper has no code for this and does not say which regular expression it used, so numbers compare
within one analysis. The ten epistemic words are set against all others.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sdjax.analysis import tables
from sdjax.analysis.epistemic import WORDS

_WORD = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True)
class WordShift:
    """`words` [W] of the base vocabulary, by falling frequency, and mu of both models, each [W]."""

    words: tuple[str, ...]
    base: np.ndarray
    model: np.ndarray

    @property
    def delta(self) -> np.ndarray:
        """delta_m(w) [W], occurrences per response."""
        return self.model - self.base

    @property
    def epistemic(self) -> np.ndarray:
        """bool [W]: which of the words are among the ten."""
        return np.isin(self.words, WORDS)


def words_of(text: str) -> list[str]:
    """The text's words, lower-cased."""
    return _WORD.findall(text.lower())


def frequencies(texts: Sequence[str]) -> collections.Counter[str]:
    """Occurrences of each word over all texts."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(words_of(text))
    return counts


def word_shift(base: Sequence[str], model: Sequence[str], min_count: int = 1) -> WordShift:
    """The shift of each word that the base responses hold at least `min_count` times.

    Raises ValueError when either side has no responses.
    """
    if not base or not model:
        raise ValueError(f"{len(base)} base and {len(model)} model responses: both must be given")
    before, after = frequencies(base), frequencies(model)
    words = tuple(word for word, n in before.most_common() if n >= min_count)
    return WordShift(
        words,
        np.array([before[word] / len(base) for word in words], float),
        np.array([after[word] / len(model) for word in words], float),
    )


def table(shifts: Mapping[str, WordShift], top: int = 10) -> str:
    """Markdown: the ten words against the rest, each of the ten, and the words that moved most.

    `shifts` maps a model's name to its shift from the common base.
    """
    rows = []
    for name, shift in shifts.items():
        ten, delta = shift.epistemic, shift.delta
        cells = []
        for part in (ten, ~ten):
            relative = delta[part].sum() / shift.base[part].sum() if part.any() else np.nan
            cells += [tables.mean_and_spread(delta[part].tolist(), 4), tables.number(relative)]
        rows.append([name, str(int(ten.sum())), cells[0], cells[1], cells[2], cells[3]])
    header = ["model", "of the ten", "delta per word", "relative", "other words", "relative"]
    parts = [tables.markdown(header, rows), _ten_words(shifts)]
    for name, shift in shifts.items():
        order = np.argsort(-np.abs(shift.delta))[:top]
        moved = ", ".join(f"{shift.words[i]} {shift.delta[i]:+.2f}" for i in order)
        parts.append(f"Largest shifts of {name}: {moved}.\n")
    return "\n".join(parts)


def _ten_words(shifts: Mapping[str, WordShift]) -> str:
    """Occurrences per response of each of the ten that the base model uses."""
    first = next(iter(shifts.values()))
    rows = []
    for word in WORDS:
        if word not in first.words:
            continue
        place = first.words.index(word)
        rows.append([word, tables.number(first.base[place])])
        rows[-1] += [tables.number(shift.model[place]) for shift in shifts.values()]
    return tables.markdown(["occurrences per response", "base", *shifts], rows)
