"""Answers that are words or a letter: compared as text, without styling, blanks and letter case."""

from __future__ import annotations

import re

from sdjax.rewards import vocabulary as v
from sdjax.rewards.nodes import INFINITY, REALS, Node, num
from sdjax.rewards.quick import squeeze
from sdjax.rewards.tokens import Token

_STYLE = re.compile(
    r"\\(?:"
    + "|".join(sorted(v.TEXT_STYLES | v.MATH_STYLES, key=len, reverse=True))
    + r")(?![A-Za-z])"
)
_SPACING = re.compile(
    r"\\(?:"
    + "|".join(sorted(v.SPACING, key=len, reverse=True))
    + r"|left|right)(?![A-Za-z])|\\[,;:!>()\[\] ]|~|\$|\\\\\s*\Z"
)
_DROPPED = re.compile(
    r"\\(?:" + "|".join(sorted(v.WITH_DROPPED_ARGUMENT)) + r")(?![A-Za-z])\s*\{[^{}]*\}"
)
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}])")
_OPTION_TEXT = re.compile(r"(?:[A-Za-z']{2,}|\d+(?:\.\d+)?)+")
_LETTER = re.compile(r"(?:[Oo]ption|[Cc]hoice)?[(\[]?([A-Za-z])[)\]]?[.):]?")
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_SPACED_DIGITS = re.compile(r"(?<=[0-9])[ \t\r\n]+(?=[0-9])")
_POINT = re.compile(r"(?<=[A-Za-z])\.")
_FORMULA = re.compile(r"[\\^_]")
NAMED_VALUES = {"infinity": INFINITY} | dict.fromkeys(
    ("allrealnumbers", "allreals", "realnumbers", "therealnumbers"), REALS
)
_PUNCTUATION = frozenset("()'-.,/?:&;!\"")


def plain_text(text: str) -> str:
    """The text that a reader sees: no style commands, braces, blanks or final full stop.

    Only blanks between digits stay, as a mark: `1\\,7` is not 17.
    """
    text = _SPACED_DIGITS.sub("\x00", _SPACING.sub(" ", _without_style(text)))
    text = re.sub(r"[{} \t\r\n]+", "", text.replace("\\&", "&"))
    return text.removesuffix(".")


def is_words(tokens: list[Token]) -> bool:
    """Whether an answer consists of words (and numbers among them) only."""
    if not any(token.kind == "word" for token in tokens):
        return False
    return (
        all(token.kind in ("word", "sym", "num") or token.text in _PUNCTUATION for token in tokens)
        and tokens[0].kind != "num"
    )


def number_word(text: str) -> Node | None:
    """`twelve`, `twenty-five` as a number, else None."""
    words = plain_text(text).casefold()
    if words in NAMED_VALUES:
        return NAMED_VALUES[words]
    if words in v.NUMBER_WORDS:
        return num(v.NUMBER_WORDS[words])
    for tens, value in v.TENS.items():
        unit = words.removeprefix(tens).lstrip("-")
        if words.startswith(tens) and 0 < v.NUMBER_WORDS.get(unit, 0) < 10 and value < 100:
            return num(value + v.NUMBER_WORDS[unit])
    return None


def gold_letter(gold: str) -> tuple[str, bool] | None:
    """(letter, styled) of a gold that is one letter of a multiple choice, else None.

    A bare capital may be a variable: `styled` is False and only the exact letter matches.
    """
    text = plain_text(gold)
    match = _LETTER.fullmatch(text)
    if not match:
        return None
    letter = match.group(1)
    styled = "(" in text or "\\text" in gold or "\\mbox" in gold
    if not styled and not letter.isupper():
        return None
    return letter, styled


def same_letter(letter: str, styled: bool, answer: str) -> bool:
    """Whether an answer names this choice, perhaps with the option's text behind it."""
    text = plain_text(answer)
    match = _LETTER.fullmatch(text)
    if match:
        found = match.group(1)
        return found == letter or (styled and found.casefold() == letter.casefold())
    if not styled:
        return False
    choices = _CHOICE.findall(text)
    option_text = text.removeprefix(f"({letter})")
    words = {word.casefold() for word in re.findall(r"[A-Za-z']+", _STYLE.sub(" ", answer))}
    return (
        text.startswith(f"({letter})")
        and len(choices) == 1
        and _OPTION_TEXT.fullmatch(option_text) is not None
        and not words & v.HEDGES
    )


def same_words(gold: str, answer: str) -> bool:
    """Text equality of words without styling, blanks, abbreviation points and letter case."""
    if any(_FORMULA.search(_SPACING.sub("", _without_style(text))) for text in (gold, answer)):
        return same_text(gold, answer)  # braces and case mean something here
    a, b = (_POINT.sub("", plain_text(text)).casefold() for text in (gold, answer))
    return a == b


def same_text(gold: str, answer: str) -> bool:
    """Text equality without styling and blanks only."""
    return _unstyled(gold) == _unstyled(answer)


def _unstyled(text: str) -> str:
    return squeeze(_SPACING.sub(" ", _without_style(text))).removesuffix(".")


def _without_style(text: str) -> str:
    """Without style commands, and without the ones whose argument is not shown."""
    return _STYLE.sub("", _DROPPED.sub("", _DOUBLED.sub(r"\\", text)))
