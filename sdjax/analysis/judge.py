"""Counting uttered doubt with a language model as judge (appendix B.5 of the paper), offline.

Writes the prompts to a file and reads a judge's replies from a file; whatever produces the replies
is not part of this package. The word count (`epistemic`) is the primary measure.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from sdjax.metrics import read_rows

MAX_EXAMPLES = 5

# The paper's instruction in our words: what counts, what does not, and the form of the reply.
PROMPT = """\
You are an annotator. Below is a response to a mathematics problem. Count the expressions of \
uncertainty in it.

Count: hedging expressions and doubt markers, such as statements of being unsure, of guessing, of \
wanting to check again, or of a possible mistake.
Do not count: confident statements, and mathematical conditionals ("if x > 0, then ...").

Reply with a JSON object and nothing else:
{{"count": <integer>, "examples": [<at most {max_examples} short quotes>]}}

Response:
<<<
{response}
>>>
"""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One reply: how many expressions of doubt, and some of them."""

    count: int
    examples: tuple[str, ...]


def build_prompt(response: str) -> str:
    """The judge's prompt for one response."""
    return PROMPT.format(response=response, max_examples=MAX_EXAMPLES)


def write_prompts(responses: Sequence[str], path: str | os.PathLike) -> None:
    """One JSON object per line: {"id": place of the response, "prompt": text}."""
    lines = [json.dumps({"id": i, "prompt": build_prompt(r)}) for i, r in enumerate(responses)]
    epath.Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def parse_reply(reply: str) -> Judgement:
    """The judgement in a reply, which may stand in a code fence or between sentences.

    Takes the first JSON object with an integer "count". Raises ValueError when there is none.
    """
    decoder = json.JSONDecoder()
    start = reply.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(reply, start)
        except json.JSONDecodeError:
            value = None
        if _valid(value):
            examples = tuple(str(example) for example in value.get("examples") or ())
            return Judgement(value["count"], examples[:MAX_EXAMPLES])
        start = reply.find("{", start + 1)
    raise ValueError(f"no JSON object with a count in the judge's reply: {reply[:80]!r}")


def _valid(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    count = value.get("count")
    return isinstance(count, int) and not isinstance(count, bool) and count >= 0


def read_replies(path: str | os.PathLike) -> tuple[dict[int, Judgement], list[str]]:
    """Judgements by response id from lines of {"id": ..., "reply": ...}, and what was unreadable.

    A reply that cannot be read is reported, not counted as zero doubt.
    """
    judgements, problems = {}, []
    for row in read_rows(path):
        try:
            judgements[int(row["id"])] = parse_reply(row["reply"])
        except ValueError as error:
            problems.append(f"id {row['id']}: {error}")
    return judgements, problems
