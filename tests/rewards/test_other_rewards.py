"""Choice, answer lines, formats, tool calls, code, and the released reward with its surprises."""

import json

import pytest

from sdjax.rewards import RewardConfig, VerifierPool, get_reward
from sdjax.rewards.registry import names
from sdjax.rewards.sandbox import run_program


def judged(name, response, gold, **options):
    return get_reward(name)(response, gold, RewardConfig(**options))


def test_released_reward_strings(shared_dir):
    """The released code's verdicts and feedback without math-verify, all 18 of them."""
    rows = json.loads((shared_dir / "fixtures/text_math_reward_strings.json").read_text())
    for row in rows:
        found = judged(
            "sdpo_released",
            row["response"],
            row["gold"],
            fallback=False,
            truncated=row["truncated"],
        )
        out = row["out"]
        assert (found.reward, found.extracted, found.feedback) == (
            out["score"],
            out["pred"],
            out["feedback"],
        )


@pytest.mark.parametrize(
    ("gold", "answer", "released"),
    [("204", "204\\pi", True), ("50", "50!", True), ("5", "5+x", True), ("1/2", "0.5", True)],
)
def test_released_reward_pays_for_wrong_answers(gold, answer, released):
    """Its false positives are its point: they must not be repaired in passing."""
    assert judged("sdpo_released", f"\\boxed{{{answer}}}", gold).correct is released


def test_released_reward_reads_the_last_100_characters():
    """A right answer followed by prose gets nothing."""
    assert not judged("sdpo_released", "\\boxed{42}" + "x" * 95, "42").correct
    assert judged("sdpo_released", "\\boxed{42}" + "x" * 90, "42").correct


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("<reasoning>r</reasoning>\n<answer>\nB\n</answer>", True),
        ("<answer>(b)</answer>", True),
        ("<answer>A</answer> no, <answer>B</answer>", True),
        ("<answer>B: 56 pC</answer>", False),
        ("<answer>A or B</answer>", False),
        ("<answer>C</answer>", False),
        ("The answer is B", False),
        ("<answer>B", False),
    ],
)
def test_choice(response, correct):
    """Only the letter in the last closed tag counts."""
    assert judged("choice", response, "B").correct is correct


def test_answer_line():
    """The DAPO prompt's line is judged as mathematics."""
    with VerifierPool(1, reward="answer_line") as pool:
        verdicts = pool.score(
            ["so\nAnswer: $\\frac{2}{4}$", "Answer: 0.5\nAnswer: 0.6", "0.5"], ["\\frac12"] * 3
        )
    assert [v.correct for v in verdicts] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "response", "ok"),
    [
        ("format_strict", "<reasoning>\nr\n</reasoning>\n<answer>\nA\n</answer>\n", True),
        ("format_strict", "<reasoning>r</reasoning><answer>A</answer>", False),
        ("format_strict", "Hi <reasoning>\nr\n</reasoning>\n<answer>\nA\n</answer>", False),
        ("format_lenient", "Hi <reasoning>r</reasoning> <answer>A</answer>", True),
        ("format_lenient", "<answer>A</answer><reasoning>r</reasoning>", False),
        ("format_boxed", "\\boxed{1}", True),
        ("format_boxed", "<think>\\boxed{1}", False),
    ],
)
def test_formats(name, response, ok):
    """Strict wants the exact lines, lenient the order, boxed a filled box."""
    assert judged(name, response, "").correct is ok


GOLD_CALLS = json.dumps(
    [
        {"Action": "getFacts", "Action_Input": '{"category": "habits", "limit": 5}'},
        {"Action": "getImage", "Action_Input": "{}"},
    ]
)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (
            'Thought: t\nAction: getFacts\nAction Input: {"limit": "5", "category": "habits"}\n'
            "Action: getImage\nAction Input: {}",
            "equal",
        ),
        (
            "Action: getImage\nAction Input: {}\nAction: getFacts\n"
            'Action Input: {"limit": 5.0, "category": "habits"}\nObservation: ...',
            "equal",
        ),
        (
            'Action: getFacts\nAction Input: {"limit": 6, "category": "habits"}\n'
            "Action: getImage\nAction Input: {}",
            "wrong_arguments",
        ),
        ("Action: getImage\nAction Input: {}", "wrong_tools"),
        ("Action: getImage\nAction Input: {", "bad_json"),
        ("Action: getImage\nAction Input: " + '{"a":' * 3000, "bad_json"),
        ("I would call getImage.", "no_call"),
    ],
)
def test_tool_calls(response, reason):
    """Calls in any order, arguments as values; anything unreadable is wrong with feedback."""
    verdict = judged("tool", response, GOLD_CALLS)
    assert verdict.reason == reason and verdict.correct is (reason == "equal")


def test_tool_golds_equal_themselves(shared_dir):
    """Every gold of the tool set, written as a response, is right."""
    with open(shared_dir / "data/tooluse/test.json") as file:
        golds = [json.loads(line)["answer"] for line in file]
    for gold in golds:
        calls = json.loads(gold)
        text = "\n".join(
            f"Action: {call['Action']}\nAction Input: {call['Action_Input']}" for call in calls
        )
        assert judged("tool", text, gold).correct


ADD = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
CALL = json.dumps(
    {
        "tests": [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}],
        "fn_name": "shift",
    }
)


def block(program):
    return f"Here:\n```python\n{program}\n```"


def test_code_passes_and_fails_with_the_case():
    """The first failing case is quoted, the expected output too."""
    program = "a, b = map(int, input().split())\nprint(a {} b)"
    assert judged("code", block(program.format("+")), ADD, deadline_s=20).correct
    verdict = judged("code", block("print(3)"), ADD, deadline_s=20)
    assert not verdict.correct and verdict.reason == "wrong_output"
    assert "Test 2 of 2 failed" in verdict.feedback and "Expected output:\n7" in verdict.feedback
    solution = (
        "class Solution:\n    def shift(self, a: List[int], k):\n        return [x + k for x in a]"
    )
    assert judged("code", block(solution), CALL, deadline_s=20).correct
    assert judged("code", "no code", ADD).reason == "no_code"
    assert judged("code", block("print(1)"), "[]").reason == "unreadable_gold"


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
        "x = [0] * 10**10",
        "open('../outside', 'w')",
    ],
)
def test_sandbox_refuses(program):
    """No network, no processes, no signals, no memory, no writing elsewhere."""
    assert run_program(program, "", 10.0, 256).error == "runtime_error"


def test_sandbox_allows_ordinary_programs():
    """Threads (for deep recursion) and files of their own are what solutions use."""
    program = (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(20000)))\nt.start()\nt.join()"
    )
    assert run_program(program, "", 20.0, 512).output.strip() == "20000"


def test_sandbox_times_out():
    """An endless loop ends with the time, as a verdict."""
    assert run_program("while True: pass", "", 0.4, 256).error == "timeout"


def test_every_built_in_reward_loads():
    """A name in the table that leads nowhere would be found by a user first."""
    for name in names():
        assert get_reward(name).name == name
