"""Decides the bulk of verdicts in the trainer process: exact text, and plain numbers by value.

Only what costs microseconds and cannot fail happens here; everything else is for a worker.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SPACE = re.compile(r"[ \t\r\n]+")
_SPACED_DIGITS = re.compile(r"(?<=[0-9])[ \t\r\n]+(?=[0-9])")
_NUMBER = re.compile(r"([+-]?)(\d{1,400})(?:\.(\d{1,400}))?\Z", re.ASCII)
_FRACTION = re.compile(r"([+-]?)\\[dtc]?frac\{([+-]?\d{1,400})\}\{([+-]?\d{1,400})\}\Z", re.ASCII)


def squeeze(text: str) -> str:
    """Text without blanks, the form in which exact matches are taken.

    A blank between two digits stays visible: `1 1/2` is not `11/2`.
    """
    return _SPACE.sub("", _SPACED_DIGITS.sub("\x00", text))


def plain_value(text: str) -> Fraction | None:
    r"""Value of a plain decimal or \frac of integers (blanks removed before), else None."""
    if match := _NUMBER.match(text):
        sign, whole, decimals = match.groups()
        value = Fraction(int(whole + (decimals or "")), 10 ** len(decimals or ""))
        return -value if sign == "-" else value
    if match := _FRACTION.match(text):
        sign, top, bottom = match.groups()
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
        return -value if sign == "-" else value
    return None


def quick_equal(answer: str, gold: str) -> bool | None:
    """True or False where two short texts decide by themselves, None where a reader is needed."""
    gold_text = squeeze(gold)
    if squeeze(answer) == gold_text:
        return True
    if (gold_value := plain_value(gold_text)) is None:
        return None
    # "1 2" must not become 12: blanks inside a number are not ours to close
    answer_value = plain_value(answer.strip(" \t\r\n"))
    return None if answer_value is None else answer_value == gold_value
