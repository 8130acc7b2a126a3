"""Removes a response's thinking from a demonstration, in the three ways of published code.

Plain string searches instead of the references' lazy regular expressions: the same text comes out
(a property test holds it), in linear time even for a response that opens `<think>` ten thousand
times. An opened block that never closes stays in full in all three, as in the references. Does not
look at token ids: `<think>` survives decoding for Qwen3 and DeepSeek.
"""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def strip_sdpo(text: str) -> str:
    """Without every `<think>...</think>` and the blanks that follow it (lasgroup/SDPO)."""
    return _without_blocks(text, eat_blanks=True)


def strip_analysis(text: str) -> str:
    """As `strip_sdpo`, then without everything up to a leftover `</think>` (the paper's code).

    The second step is what a template that opens `<think>` in the prompt needs, as that of
    DeepSeek-R1-Distill: its responses close a block that they never opened.
    """
    text = strip_sdpo(text)
    end = text.find(CLOSE)
    return text if end < 0 else text[end + len(CLOSE) :].lstrip()


def strip_trl(text: str) -> str:
    """Without every `<think>...</think>`, outer blanks trimmed, inner ones kept (TRL)."""
    return _without_blocks(text, eat_blanks=False).strip()


def _without_blocks(text: str, eat_blanks: bool) -> str:
    kept, position = [], 0
    while (start := text.find(OPEN, position)) >= 0:
        end = text.find(CLOSE, start)
        if end < 0:
            break
        kept.append(text[position:start])
        position = end + len(CLOSE)
        while eat_blanks and position < len(text) and text[position].isspace():
            position += 1
    return "".join(kept) + text[position:]


STRIPPERS = {
    "none": lambda text: text,
    "sdpo": strip_sdpo,
    "analysis": strip_analysis,
    "trl": strip_trl,
}
