"""Counts the ten epistemic words, the paper's measure of uttered doubt.

The paper counts substrings ("unlikely" counts as "likely"); a word-boundary count stands beside it
as a sensitivity check and the two are never mixed. Nothing here knows of tokens: callers pass
lengths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import nan

WORDS = (
    "wait",
    "hmm",
    "perhaps",
    "maybe",
    "actually",
    "alternatively",
    "seems",
    "might",
    "likely",
    "check",
)
_BOUNDED = re.compile(r"\b(" + "|".join(WORDS) + r")\b")


def count(text: str) -> dict[str, int]:
    """Non-overlapping substring counts of the ten words in the lower-cased text, thinking included.

    "unlikely", "checked", "mighty" and "await" count, as in the reference script
    (self-distillation-analysis, eval/check_epistemic_tokens.py:5-20; METHODS 6.2).
    """
    lowered = text.lower()
    return {word: lowered.count(word) for word in WORDS}


def count_bounded(text: str) -> dict[str, int]:
    """Counts of the ten as whole words only: the sensitivity check of METHODS 6.2."""
    counts = dict.fromkeys(WORDS, 0)
    for match in _BOUNDED.finditer(text.lower()):
        counts[match.group(1)] += 1
    return counts


def total(counts: Mapping[str, int]) -> int:
    """E(y): the sum over the ten words."""
    return sum(counts[word] for word in WORDS)


def per_1000_tokens(num_words: float, num_tokens: float) -> float:
    """Epistemic words per 1000 response tokens; NaN when there are no tokens.

    Reported beside the count per response because count and length fall together.
    """
    return 1000.0 * num_words / num_tokens if num_tokens > 0 else nan


def summary(texts: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
    """Means over responses, under names without an area; `lengths` are in tokens.

    `per_response` and one entry per word are means per response; `per_1k_tokens` divides the sum of
    all words by the sum of all tokens; `bounded_per_response` is the whole-word count. Empty input
    gives NaN.
    """
    if len(texts) != len(lengths):
        raise ValueError(f"{len(texts)} texts but {len(lengths)} lengths")
    n = len(texts)
    if n == 0:
        return dict.fromkeys(("per_response", "per_1k_tokens", "bounded_per_response", *WORDS), nan)
    counts = [count(text) for text in texts]
    words = {word: sum(one[word] for one in counts) for word in WORDS}
    bounded = sum(total(count_bounded(text)) for text in texts)
    return {
        "per_response": total(words) / n,
        "per_1k_tokens": per_1000_tokens(total(words), sum(lengths)),
        "bounded_per_response": bounded / n,
    } | {word: words[word] / n for word in WORDS}
