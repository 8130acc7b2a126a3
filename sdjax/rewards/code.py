"""Python programs against tests (LiveCodeBench, APPS): the failing case is the feedback.

Gold: JSON, either `{"inputs": [...], "outputs": [...], "fn_name": name or null}` or a list of
`{"input": ..., "output": ..., "testtype": "stdin" or "functional"}` with the function's name as
`{"tests": [...], "fn_name": name}`. Programs run in `sdjax.rewards.sandbox`; expected outputs never
enter it.
"""

from __future__ import annotations

import json
import time
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from sdjax.records import Verdict
from sdjax.rewards.extract import missing
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.registry import Reward
from sdjax.rewards.sandbox import Outcome, call_function, run_program

MAX_CODE_CHARS = 60_000
FORMAT = "Give the whole program in one ```python code block."


class Tests(NamedTuple):
    """Inputs and expected outputs; `function` is None for programs that read stdin."""

    inputs: list
    outputs: list
    function: str | None


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """The last fenced code block."""
    if not gold or not gold.strip():
        return missing("empty_gold")
    program = last_code_block(response or "")
    if program is None:
        return Verdict(False, None, "no_code", FORMAT)
    if len(program) > MAX_CODE_CHARS:
        return Verdict(False, None, "too_long", f"The program exceeds {MAX_CODE_CHARS} characters.")
    return program


def last_code_block(text: str) -> str | None:
    """Content of the last closed ``` fence, without its language tag."""
    end = text.rfind("```")
    start = text.rfind("```", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    _, newline, program = text[start + 3 : end].partition("\n")
    return program if newline and program.strip() else None


def read_tests(gold: str) -> Tests:
    """Tests of a gold; raises ValueError where it has none."""
    data = json.loads(gold)
    name = None
    if isinstance(data, dict) and "tests" in data:
        name, data = data.get("fn_name"), data["tests"]
    if isinstance(data, dict):
        tests = Tests(list(data["inputs"]), list(data["outputs"]), data.get("fn_name"))
    else:
        functional = any(test.get("testtype") == "functional" for test in data)
        if functional and not name:
            name = next((test["fn_name"] for test in data if test.get("fn_name")), None)
            if name is None:
                raise ValueError("functional tests need fn_name")
        tests = Tests([t["input"] for t in data], [t["output"] for t in data], name)
    if not tests.inputs or len(tests.inputs) != len(tests.outputs):
        raise ValueError("as many outputs as inputs are needed, and at least one")
    return tests


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Run the tests until one fails; its case becomes the feedback."""
    try:
        tests = read_tests(gold)
    except (ValueError, TypeError, KeyError, AttributeError):
        return missing("unreadable_gold")
    stop = time.monotonic() + max(config.deadline_s - 0.5, 0.5 * config.deadline_s)
    count = len(tests.inputs) if config.tests_per_problem is None else config.tests_per_problem
    for index in range(min(count, len(tests.inputs))):
        seconds = min(config.test_seconds, stop - time.monotonic())
        if seconds <= 0:
            return Verdict(False, None, "timeout", "The tests took too long in total.")
        outcome = _run(answer, tests, index, seconds, config)
        if outcome.error == "no_sandbox":
            raise RuntimeError(f"the code reward needs its sandbox: {outcome.output}")
        failed = outcome.error or not same_output(outcome, tests, index)
        if failed:
            feedback = describe(outcome, tests, index, config.feedback_chars)
            return Verdict(False, None, outcome.error or "wrong_output", feedback)
    return Verdict(True, None, "passed")


def _run(program: str, tests: Tests, index: int, seconds: float, config: RewardConfig) -> Outcome:
    if tests.function is None:
        return run_program(program, str(tests.inputs[index]), seconds, config.test_memory_mb)
    arguments = _arguments(tests.inputs[index])
    return call_function(program, tests.function, arguments, seconds, config.test_memory_mb)


def _arguments(raw) -> list:
    """Arguments of a call: a list, or one JSON value a line (LiveCodeBench)."""
    if isinstance(raw, str):
        return [json.loads(line) for line in raw.splitlines() if line.strip()]
    return list(raw)


def same_output(outcome: Outcome, tests: Tests, index: int) -> bool:
    """Line by line without trailing blanks, numbers as decimals; a call's value as JSON."""
    expected = tests.outputs[index]
    if tests.function is None:
        expected = expected if isinstance(expected, str) else "\n".join(map(str, expected))
        return _lines_equal(outcome.output, expected)
    wanted = [expected]
    if isinstance(expected, str):
        try:
            wanted.append(json.loads(expected))
        except ValueError:
            pass
    elif isinstance(expected, list) and len(expected) == 1:
        wanted.append(expected[0])  # APPS wraps the value of a call in a list
    return any(_strict(outcome.value) == _strict(value) for value in wanted)


def _strict(value) -> str:
    """JSON text, so that True is not 1 but 1.0 is 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(_strict(item) for item in value) + "]"
    return json.dumps(value, sort_keys=True)


def _lines_equal(output: str, expected: str) -> bool:
    found, wanted = ([line.split() for line in t.strip().splitlines()] for t in (output, expected))
    if len(found) != len(wanted):
        return False
    return all(
        len(a) == len(b) and all(map(_tokens_equal, a, b))
        for a, b in zip(found, wanted, strict=True)
    )


def _tokens_equal(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return len(a) < 400 and Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def describe(outcome: Outcome, tests: Tests, index: int, limit: int) -> str:
    """The failing case as text for the teacher's context."""
    parts = [f"Test {index + 1} of {len(tests.inputs)} failed."]
    if tests.function:
        parts.append(f"Call: {tests.function}({_cut(_shown(tests.inputs[index]), limit)})")
    else:
        parts.append(f"Input:\n{_cut(_shown(tests.inputs[index]), limit)}")
    parts.append(f"Expected output:\n{_cut(_shown(tests.outputs[index]), limit)}")
    found = outcome.output if tests.function is None else json.dumps(outcome.value)
    if outcome.error:
        parts.append(f"Error ({outcome.error}):\n{_cut(outcome.output, limit)}")
    else:
        parts.append(f"Your output:\n{_cut(found, limit)}")
    return "\n".join(parts)


def _shown(value) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


CODE = Reward(name="code", extract=extract, judge=judge)
