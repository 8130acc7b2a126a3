"""Rows of any table become problems: column mapping, the shapes a prompt column comes in, bad rows.

A row is a dict. Columns are named by dotted paths ("reward_model.ground_truth"), which also look
inside JSON strings, since the public files hold both nested structs and JSON text. Does not open
files (`sdjax.data.sources`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from sdjax.data import prompts
from sdjax.records import Problem

# Usual names of public data sets, tried in this order where the config names no column.
GUESSES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "problem", "question", "instruction", "input"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth", "gold", "target"),
    "solution": ("solution", "extra_info.solution", "rationale"),
    "feedback": ("feedback",),
    "system": ("system",),
    "id": ("id", "problem_id", "unique_id", "extra_info.index", "idx", "index"),
}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Dotted column paths; an empty one is looked for under the usual names."""

    prompt: str = ""
    answer: str = ""
    solution: str = ""
    feedback: str = ""
    system: str = ""
    id: str = ""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be a problem: its index in the source and why."""

    index: int
    reason: str


class RowError(ValueError):
    """Raised by a row reader; the message says what is wrong with the row."""


_MISSING = object()


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, through dicts and JSON strings; None where it is missing."""
    value = _descend(row, path)
    return None if value is _MISSING else value


def _descend(row: Mapping[str, Any], path: str) -> Any:
    if path in row:
        return row[path]
    head, _, rest = path.partition(".")
    if not rest or head not in row:
        return _MISSING
    inner = from_json(row[head])
    return _descend(inner, rest) if isinstance(inner, Mapping) else _MISSING


def from_json(value: Any) -> Any:
    """A JSON object or list where `value` is the text of one, else `value` itself."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def pick(row: Mapping[str, Any], columns: Columns, field: str) -> Any:
    """The value of `field`: from the named column, else from the first usual name present."""
    named = getattr(columns, field)
    if named:
        value = _descend(row, named)
        if value is _MISSING:
            raise RowError(
                f"no column {named!r} (config.data.columns.{field}); the row has "
                f"{', '.join(sorted(row))}"
            )
        return value
    for path in GUESSES[field]:
        value = lookup(row, path)
        if value is not None:
            return value
    return None


def split_messages(value: Any) -> tuple[list[dict[str, str]], str]:
    """A prompt column as (earlier messages, text of the user's turn).

    The column may hold plain text, a list of {role, content}, or that list as JSON text.
    """
    if isinstance(value, str):
        parsed = from_json(value)
        if not _is_chat(parsed):
            return [], value
        value = parsed
    if not _is_chat(value):
        raise RowError(f"the prompt is a {type(value).__name__}, neither text nor chat messages")
    messages = [{"role": str(m["role"]), "content": _content(m["content"])} for m in value]
    if messages[-1]["role"] != "user":
        raise RowError(f"the prompt ends with role {messages[-1]['role']!r} instead of 'user'")
    return messages[:-1], messages[-1]["content"]


def _content(value: Any) -> str:
    """A message's text; some data sets store it in parts, [{"type": "text", "text": ...}]."""
    if not isinstance(value, list | tuple):
        return str(value)
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
    if not all(isinstance(part, str) for part in parts):
        raise RowError("a message holds something else than text")
    return "".join(parts)


def _is_chat(value: Any) -> bool:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return False
    items = list(value)
    return bool(items) and all(
        isinstance(m, Mapping) and "role" in m and "content" in m for m in items
    )


def read_row(row: Mapping[str, Any], index: int, columns: Columns, style: str) -> Problem:
    """One row as a problem with its prompt in `style`. Raises RowError saying what is missing."""
    history, text = split_messages(_required(row, columns, "prompt"))
    if not text.strip():
        raise RowError("the prompt is empty")
    answer = as_text(_required(row, columns, "answer"))
    if not answer.strip():
        raise RowError("the answer is empty")
    system = pick(row, columns, "system")
    if system is not None and str(system).strip():
        history = [{"role": "system", "content": str(system)}, *history]
    number = pick(row, columns, "id")
    return make_problem(
        identity=str(index if number is None else number),
        text=text,
        answer=answer,
        style=style,
        solution=_optional(pick(row, columns, "solution")),
        feedback=_optional(pick(row, columns, "feedback")),
        history=history,
        meta={"row": index, "source": str(row.get("data_source", row.get("dataset", "")))},
    )


def make_problem(
    *,
    identity: str,
    text: str,
    answer: str,
    style: str,
    solution: str | None = None,
    feedback: str | None = None,
    history: list[dict[str, str]] | None = None,
    meta: dict[str, Any] | None = None,
) -> Problem:
    """A problem whose prompt is `text` in `style`; the bare question is kept in its meta."""
    meta = dict(meta or {})
    meta["question"] = prompts.bare(text)
    if history:
        meta["history"] = history
    return Problem(
        id=identity,
        prompt=prompts.styled(text, style),
        answer=answer,
        solution=solution,
        feedback=feedback,
        meta=meta,
    )


def as_text(value: Any) -> str:
    """A gold as text: strings as they are, whole floats without ".0", the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bool | int | float | Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _required(row: Mapping[str, Any], columns: Columns, field: str) -> Any:
    value = pick(row, columns, field)
    if value is None or value != value:  # NaN is how tables say that a number is missing
        tried = getattr(columns, field) or ", ".join(GUESSES[field])
        raise RowError(
            f"no {field} (looked for {tried}; the row has {', '.join(sorted(row))}): name the "
            f"column in config.data.columns.{field}"
        )
    return value


def _optional(value: Any) -> str | None:
    return None if value is None or not str(value).strip() else str(value)
