"""Supervised examples and the rows they are packed into. numpy only.

A source gives, for an index, the text of one example as spans that are to be learnt or only read;
a batch is a pure function of the step, so a resumed run sees what an uninterrupted one would.
Sources: `reasoner` (the simulated traces that the tiny model is pretrained on) and `jsonl` (a file
of prompts and responses: off-policy training on somebody's data).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sdjax.data import chat, reasoner

Spans = list[tuple[str, bool]]  # text, and whether it is to be learnt
Source = Callable[[int], Spans]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed examples: inputs [B, T], and per learnt token [B, R] its id and where it is predicted.

    `index` is the place in the row whose hidden state predicts `targets`; `mask` is true on real
    slots. All int32 but `mask` (bool). `dropped` counts examples that found no room.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    index: np.ndarray
    mask: np.ndarray
    dropped: int

    def arrays(self) -> dict[str, np.ndarray]:
        """What the device needs, by name."""
        return {k: v for k, v in vars(self).items() if k != "dropped"}


def source(c: ConfigDict, tokenizer: Any) -> Source:
    """The source that `config.sft.source` names. Raises ValueError for an unknown one."""
    if c.sft.source not in SOURCES:
        raise ValueError(
            f"config.sft.source is {c.sft.source!r}, but must be one of {', '.join(SOURCES)}"
        )
    return SOURCES[c.sft.source](c, tokenizer)


def _chat_spans(c: ConfigDict, tokenizer: Any, prompt: Any, response: str, thinking: bool) -> Spans:
    text = chat.render_prompt(
        tokenizer,
        prompt,
        enable_thinking=thinking,
        system=c.data.system,
        chat_template=c.data.chat_template,
    )
    return [(text, False), (response + tokenizer.eos_token, True)]


def reasoner_source(c: ConfigDict, tokenizer: Any) -> Source:
    """Traces of the simulated reasoner; drills of plain facts at the start, fading out.

    The share of drills falls linearly from `sft.drill_start` to 0 at `sft.drill_until` of the run.
    """
    fade = max(1.0, c.sft.drill_until * c.sft.steps * c.sft.examples)

    def example(index: int) -> Spans:
        # a fixed scramble of the index stands in for a random number
        chance = (index * 2654435761 % 2**32) / 2**32
        if chance < c.sft.drill_start * (1 - index / fade):
            return reasoner.make_drill(index, c.seed)
        made = reasoner.make_example(index, c.seed)
        return _chat_spans(c, tokenizer, made.prompt, made.response, made.enable_thinking)

    return example


def jsonl_source(c: ConfigDict, tokenizer: Any) -> Source:
    """Rows {"prompt": text or messages, "response": text} of a file, in a new order each epoch."""
    path = Path(c.sft.path)
    if not path.is_file():
        raise ValueError(
            f"config.sft.path is {c.sft.path!r}, which is no file: give a .jsonl file with fields "
            '"prompt" and "response"'
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not row.get("prompt") or not isinstance(row.get("response"), str):
            raise ValueError(
                f'{path}, line {number}: needs a "prompt" (text or messages) and a "response" text'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} (config.sft.path) holds no example")

    def example(index: int) -> Spans:
        epoch, place = divmod(index, len(rows))
        order = np.random.default_rng([c.seed, epoch]).permutation(len(rows))
        row = rows[order[place]]
        thinking = row.get("enable_thinking", c.data.enable_thinking)
        return _chat_spans(c, tokenizer, row["prompt"], row["response"], thinking)

    return example


SOURCES: dict[str, Callable[[ConfigDict, Any], Source]] = {
    "reasoner": reasoner_source,
    "jsonl": jsonl_source,
}


def encode(tokenizer: Any, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [T] of the spans, and bool [T]: which of them are to be learnt."""
    ids = [chat.encode_text(tokenizer, text) for text, _ in spans]
    learn = [np.full(len(x), flag) for x, (_, flag) in zip(ids, spans, strict=True)]
    return np.concatenate(ids), np.concatenate(learn)


def pack(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], rows: int, row_len: int, slots: int
) -> Rows:
    """Packs (tokens, learn) examples, longest first into the first row with room.

    The last token of an example is a target only, never an input.
    """
    out = Rows(
        tokens=np.zeros((rows, row_len), np.int32),
        segment_ids=np.zeros((rows, row_len), np.int32),
        positions=np.zeros((rows, row_len), np.int32),
        targets=np.zeros((rows, slots), np.int32),
        index=np.zeros((rows, slots), np.int32),
        mask=np.zeros((rows, slots), bool),
        dropped=0,
    )
    used, learnt = np.zeros(rows, int), np.zeros(rows, int)
    dropped = 0
    for tokens, learn in sorted(examples, key=lambda e: -len(e[0])):
        places = np.flatnonzero(learn[1:])  # the token after place t is predicted at t
        n, k = len(tokens) - 1, len(places)
        room = np.flatnonzero((used + n <= row_len) & (learnt + k <= slots))
        if not len(room):
            dropped += 1
            continue
        b = room[0]
        at, to = slice(used[b], used[b] + n), slice(learnt[b], learnt[b] + k)
        out.tokens[b, at] = tokens[:-1]
        out.segment_ids[b, at] = out.segment_ids[b].max() + 1
        out.positions[b, at] = np.arange(n)
        out.targets[b, to] = tokens[1:][places]
        out.index[b, to] = used[b] + places
        out.mask[b, to] = True
        used[b], learnt[b] = used[b] + n, learnt[b] + k
    return dataclasses.replace(out, dropped=dropped)


def batch(read: Source, tokenizer: Any, sft: ConfigDict, step: int) -> Rows:
    """The rows of training step `step` (1-based): the same examples whenever it is asked."""
    first = (step - 1) * sft.examples
    examples = [encode(tokenizer, read(first + i)) for i in range(sft.examples)]
    return pack(examples, sft.rows or sft.examples, sft.row_len, sft.slots or sft.row_len)
