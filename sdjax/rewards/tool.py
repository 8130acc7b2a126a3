"""Tool calls in ToolAlpaca's format: the right tools with the right arguments.

The gold is JSON, `[{"Action": name, "Action_Input": "{json}"}, ...]`; the response writes
`Action: name` and `Action Input: {json}` lines. Calls are compared as a multiset, arguments as JSON
values; a number and its numeral are the same argument, since the golds themselves waver there.
"""

from __future__ import annotations

import json
import re

from sdjax.records import Verdict
from sdjax.rewards.extract import missing
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward

MAX_CHARS = 20_000
MAX_CALLS = 32
_ACTION = re.compile(r"^[ \t*]{0,8}Action[ \t]?:[ \t*`]*([^\n]{1,200}?)[ \t*`]*$", re.MULTILINE)
_INPUT = re.compile(r"\s*[ \t*]{0,8}Action[ _]Input[ \t]?:[ \t*]*")
FORMAT = "Write each call as two lines, 'Action: tool name' and 'Action Input: {JSON}'."
Call = tuple[str, str]


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """What follows any reasoning; cheap, since calls stand at the end."""
    if not gold or not gold.strip():
        return missing("empty_gold")
    return (response or "").rpartition("</think>")[2][-MAX_CHARS:]


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Right when the calls are those of the gold, in any order."""
    try:
        wanted = sorted(gold_calls(gold))
    except (ValueError, TypeError, KeyError, RecursionError):
        return missing("unreadable_gold")
    try:
        calls = response_calls(answer)
    except (ValueError, RecursionError) as error:
        feedback = f"{FORMAT} An Action Input is not valid JSON: {error}"
        return Verdict(False, None, "bad_json", feedback[: config.feedback_chars])
    if not calls:
        return Verdict(False, None, "no_call", FORMAT)
    correct = sorted(calls) == wanted
    reason = "equal" if correct else _difference(calls, wanted)
    return Verdict(correct, json.dumps(calls)[:500], reason)


def gold_calls(gold: str) -> list[Call]:
    """(tool, canonical arguments) of each call of a gold."""
    return [(call["Action"], _canonical(call["Action_Input"])) for call in json.loads(gold)]


def response_calls(text: str) -> list[Call]:
    """(tool, canonical arguments) of each call in a response; raises ValueError on bad JSON."""
    calls: list[Call] = []
    for action in _ACTION.finditer(text):
        label = _INPUT.match(text, action.end())
        if label is None:
            continue
        if len(calls) >= MAX_CALLS:
            raise ValueError(f"more than {MAX_CALLS} calls")
        start = text.find("{", label.end())
        if start < 0 or text[label.end() : start].strip("` \t\r\njson"):
            raise ValueError("no JSON object after Action Input")
        arguments, _ = json.JSONDecoder().raw_decode(text, start)
        calls.append((action.group(1), _canonical(arguments)))
    return calls


def _canonical(arguments) -> str:
    """Arguments as sorted JSON with numbers as numerals."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return json.dumps(_numerals(arguments), sort_keys=True)


def _numerals(value):
    if isinstance(value, dict):
        return {str(key): _numerals(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numerals(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


def _difference(calls: list[Call], wanted: list[Call]) -> str:
    same_tools = sorted(name for name, _ in calls) == sorted(name for name, _ in wanted)
    return "wrong_arguments" if same_tools else "wrong_tools"


TOOL = Reward(name="tool", extract=extract, judge=judge, inline=True)
