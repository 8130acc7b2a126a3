r"""Finds the answer in a response: last \boxed{...}, <answer> tag, `Answer:` line.

Everything scans from the end with `rfind`, so a megabyte of prose costs microseconds, and nothing
ever falls back to text outside the box: an answer that is not where it was asked for is wrong.
"""

from __future__ import annotations

import re

from sdjax.records import Verdict
from sdjax.rewards.options import DEFAULT, RewardConfig

BOX = "\\boxed"
_TAIL = re.compile(r"\s{0,16}\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(r"(?im)^[ \t>*#_-]{0,8}(?:final )?answer[ \t*_]{0,4}:[ \t*_]{0,4}(.*)$")


def last_box(text: str) -> tuple[str | None, str]:
    r"""(content, reason) of the last \boxed{...}; content is None when there is none to judge.

    `\{` and `\}` are characters, not braces. Of nested boxes the innermost counts, because it is
    the last to begin. reason: "ok", "no_box", "unclosed_box", "empty_box".
    """
    end = len(text)
    while (start := text.rfind(BOX, 0, end)) >= 0:
        opening = _TAIL.match(text, start + len(BOX))
        if opening:
            content = _braced(text, opening.end())
            if content is None:
                return None, "unclosed_box"
            return (content, "ok") if content.strip() else (None, "empty_box")
        end = start
    return None, "no_box"


def _braced(text: str, start: int) -> str | None:
    """Text up to the brace that closes the one just before `start`, or None."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        brace = match.group()
        if brace == "{":
            depth += 1
        elif brace == "}":
            depth -= 1
            if depth == 0:
                return text[start : match.start()]
    return None


def in_unclosed_think(text: str) -> bool:
    """Whether the end of the response still lies inside a <think> that was never closed."""
    return text.rfind("<think>") > text.rfind("</think>")


def boxed_answer(response: str | None, config: RewardConfig = DEFAULT) -> tuple[str | None, str]:
    """`last_box` of a response under the configured policy for unfinished reasoning."""
    if not response:
        return None, "no_box"
    if not config.box_in_unclosed_think and in_unclosed_think(response):
        return None, "unclosed_think"
    return last_box(response)


def tagged(response: str, tag: str) -> str | None:
    """Content of the last <tag>...</tag>, or None."""
    end = response.rfind(f"</{tag}>")
    start = response.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or start < 0 else response[start + len(tag) + 2 : end]


def answer_line(response: str) -> str | None:
    """Rest of the last line that begins with `Answer:` (the original DAPO prompt), or None."""
    lines = _LINE.findall(response[-4000:])
    return lines[-1].strip().rstrip("*_ ") if lines else None


def missing(reason: str) -> Verdict:
    """The verdict on a response without an answer to judge."""
    return Verdict(correct=False, extracted=None, reason=reason)
