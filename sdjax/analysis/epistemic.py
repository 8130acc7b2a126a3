"""Counts the ten epistemic words, the paper's measure of uttered doubt.

The paper counts substrings ("unlikely" counts as "likely"); a word-boundary count stands beside it
as a sensitivity check and the two are never mixed. Nothing here knows of tokens: callers pass
lengths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
