"""A simulated noisy reasoner: the texts that the tiny model is pretrained on.

It works a synthetic problem step by step and slips more often where a step is harder (carries,
borrows, products, remainders). It knows roughly where it is weak: it hedges there ("hmm", "maybe",
"might be off") and looks again more often after a hedge ("wait, check ..."), by a slower way in
smaller steps that is nearly always right. So the epistemic words do real work: they mark doubt, and
checking raises accuracy. Shown a correct solution it writes a short, sure, nearly faultless trace.

All of this is built in on purpose and is no finding; docs/tiny.md says so. Everything is a pure
function of (seed, index). Does not tokenize.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from sdjax.data.synthetic import DAYS, Step, Value, apply_op, draw, render_step, resolve
from sdjax.records import Problem
from sdjax.teacher.templates import PRESETS

HEDGES_BEFORE = ("Hmm, ", "Maybe ", "Perhaps ", "Likely ")
LOOKS_RIGHT, LOOKS_WRONG = " seems right", " might be off"
CHECKS = (" wait, check ", " hmm, check ", " alternatively ")
DIRECT = " actually "
GUIDED_PRESETS = ("paper", "paper", "hint")  # of sdjax.teacher.templates
MAX_CHECKS = 3  # of the slow kind in one trace, so that no response grows past about 120 tokens


@dataclasses.dataclass(frozen=True)
class Temper:
    """How the reasoner behaves; tuples are indexed by a step's difficulty 0, 1, 2.

    `slip` chance of a wrong value at first sight, `hedge` chance of marking doubt; `notice` and
    `recheck` chances of looking again at a wrong and at a right value, without and with a hedge;
    `quick` share of second looks that only state a value; chances that either look is wrong.
    """

    slip: tuple[float, float, float] = (0.08, 0.38, 0.48)
    hedge: tuple[float, float, float] = (0.03, 0.25, 0.45)
    notice: float = 0.3
    notice_hedged: float = 0.75
    recheck: float = 0.03
    recheck_hedged: float = 0.3
    quick: float = 0.25
    quick_wrong: float = 0.2
    careful_wrong: float = 0.03


NOISY = Temper()
SURE = Temper(slip=(0.01, 0.01, 0.02), hedge=(0.005, 0.005, 0.01), notice=0.9, recheck=0.002)
ANSWER_KNOWN = Temper(slip=(0.01, 0.05, 0.08), hedge=(0.02, 0.12, 0.25), notice=0.6)
UNCERTAIN = Temper(
    slip=(0.02, 0.06, 0.1), hedge=(0.3, 0.6, 0.8), notice=0.7, recheck=0.1, recheck_hedged=0.4
)
NO_THINK = Temper(slip=(0.08, 0.32, 0.44), hedge=(0.01, 0.05, 0.1), notice=0.15, quick=0.8)


# ---------------------------------------------------------------------------------- single steps


def difficulty(op: str, a: Value, b: Value) -> int:
    """0 easy, 1 hard, 2 hardest: what the reasoner feels before it has worked the step out."""
    if op in "+-*" and min(a, b) < 0:
        return 2  # only after a slip
    if op in "+-":
        carry = a % 10 + b % 10 > 9 if op == "+" else a % 10 < b % 10
        return int(carry) + int(b > 9)
    if op == "*":
        return int(a * b > 25) + int(a > 10)
    if op == "mod":
        return int(a >= 2 * b) + int(a >= 5 * b)
    return int(op == "day")


def slip_value(rng: random.Random, op: str, a: Value, b: Value, value: Value) -> Value:
    """A plausible wrong value: a lost carry, off by one, the neighbour in the table."""
    if op == "day":
        return DAYS[(DAYS.index(value) + rng.choice((-1, 1))) % 7]
    if op == "max":
        return min(a, b) if a != b else value
    if op == "mod":
        return (value + rng.choice((-2, -1, 1, 2))) % b
    shifts = (-b, b, -10, 10, -1, 1) if op == "*" else (-10, -10, 10, 10, -1, 1, -2, 2)
    shift = rng.choice(shifts) or 1
    return value + shift if value + shift >= 0 else value + abs(shift)


def careful_parts(op: str, a: Value, b: Value) -> list[str]:
    """The smaller steps by which a step is checked; empty when it has none.

    Sums by columns, differences and products by tens and ones, remainders by the multiple below.
    """
    if isinstance(a, str) or min(a, b) < 0:
        return []
    if op == "+":
        return _columns(a, b)
    if op == "-" and a >= b:
        return _subtract_by_places(a, b)
    if op == "*" and a > 10:
        return [f"{part}*{b}={part * b}" for part in _places(a)]
    if op == "*" and b > 5:
        return [f"{a}*5={a * 5}", f"{a}*{b - 5}={a * (b - 5)}"]
    if op == "mod" and a >= b:
        below = a // b
        return [f"{b}*{below}={b * below}", f"{a}-{b * below}={a % b}"]
    return []


def _columns(a: int, b: int) -> list[str]:
    parts, carry = [], 0
    while a or b:
        digits = [str(x % 10) for x in (a, b) if x] + ["1"] * carry
        total = a % 10 + b % 10 + carry
        if len(digits) > 1:
            parts.append(f"{'+'.join(digits)}={total}")
        carry, a, b = total // 10, a // 10, b // 10
    return parts if len(parts) > 1 or carry else []


def _places(a: int) -> list[int]:
    return [
        int(d) * 10**p for p, d in zip(range(len(str(a)))[::-1], str(a), strict=True) if d > "0"
    ]


def _subtract_by_places(a: int, b: int) -> list[str]:
    pieces = _places(b)
    if len(pieces) == 1 and b < 10 and a % 10 < b and a % 10:
        pieces = [a % 10, b - a % 10]  # down to the ten first
    if len(pieces) < 2:
        return []
    parts = []
    for piece in pieces:
        parts.append(f"{a}-{piece}={a - piece}")
        a -= piece
    return parts


# --------------------------------------------------------------------------------------- traces


@dataclasses.dataclass(frozen=True)
class Trace:
    """The lines of a worked trace and the value it arrives at."""

    lines: tuple[str, ...]
    value: Value

    @property
    def text(self) -> str:
        """The trace as a response without thinking tags."""
        return "\n".join(self.lines) + f"\n\nThe answer is \\boxed{{{self.value}}}."

    @property
    def thinking_text(self) -> str:
        """The trace as a response whose steps stand inside the thinking tags."""
        lines = "\n".join(self.lines)
        return f"<think>\n{lines}\n</think>\n\nThe answer is \\boxed{{{self.value}}}."


def _work_step(
    rng: random.Random, temper: Temper, op: str, a: Value, b: Value, may_check: bool
) -> tuple[str, Value, bool]:
    """One line of a trace: its text, the value carried on, whether a careful check was spent."""
    right = apply_op(op, a, b)
    level = difficulty(op, a, b)
    slipped = rng.random() < temper.slip[level]
    hedged = rng.random() < temper.hedge[level]
    value = slip_value(rng, op, a, b, right) if slipped else right
    line = render_step(op, a, b, value)
    if hedged and rng.random() < 0.6:
        line = rng.choice(HEDGES_BEFORE) + line
    elif hedged:
        line += LOOKS_WRONG if (rng.random() < 0.75) == slipped else LOOKS_RIGHT
    look = (
        (temper.notice_hedged if hedged else temper.notice)
        if slipped
        else (temper.recheck_hedged if hedged else temper.recheck)
    )
    if op == "max" or rng.random() >= look:
        return line, value, False
    if not may_check or rng.random() < temper.quick:
        wrong = rng.random() < temper.quick_wrong
        value = slip_value(rng, op, a, b, right) if wrong else right
        return f"{line}{DIRECT}{value}", value, False
    parts = careful_parts(op, a, b)
    wrong = rng.random() < temper.careful_wrong
    value = slip_value(rng, op, a, b, right) if wrong else right
    work = ", ".join([*parts, str(value)]) if parts else render_step(op, a, b, value)
    return f"{line}{rng.choice(CHECKS)}{work}", value, True


def work(steps: Sequence[Step], rng: random.Random, temper: Temper = NOISY) -> Trace:
    """Works the steps in order; a wrong value that goes unnoticed is carried on."""
    values: list[Value] = []
    lines, checks = [], 0
    for op, a, b in steps:
        line, value, checked = _work_step(
            rng, temper, op, resolve(a, values), resolve(b, values), checks < MAX_CHECKS
        )
        lines.append(line)
        values.append(value)
        checks += checked
    return Trace(tuple(lines), values[-1])


def correct_trace(problem: Problem, rng: random.Random, temper: Temper = NOISY) -> Trace:
    """A trace with the right answer, by trying until one comes out (as a sampled sibling is)."""
    while True:
        trace = work(problem.meta["steps"], rng, temper)
        if str(trace.value) == problem.answer:
            return trace


# ------------------------------------------------------------------------- pretraining examples


@dataclasses.dataclass(frozen=True)
class Example:
    """One supervised example: the user's turn, the response, whether thinking is switched on."""

    prompt: str
    response: str
    enable_thinking: bool
    kind: str


MIXTURE = {  # kind of example -> share
    "think": 0.54,
    "no_think": 0.08,
    "guided": 0.16,
    "guided_answer": 0.07,
    "guided_worked": 0.04,
    "guided_no_think": 0.05,
    "guided_uncertain": 0.03,
    "feedback": 0.03,
}


def reprompt(
    problem: Problem, *, solution: str | None = None, feedback: str | None = None, preset="paper"
) -> str:
    """The teacher's user turn as training writes it (METHODS 3.2)."""
    return PRESETS[preset].user_turn(
        prompt=problem.prompt, question=problem.prompt, solution=solution, feedback=feedback
    )


def _answer_known(problem: Problem, rng: random.Random) -> Trace:
    """A trace by somebody who knows the answer, not the way: a wrong end is put right."""
    trace = work(problem.meta["steps"], rng, ANSWER_KNOWN)
    if str(trace.value) == problem.answer or rng.random() < 0.05:
        return trace
    lines = (*trace.lines[:-1], f"{trace.lines[-1]}{DIRECT}{problem.answer}")
    return Trace(lines, problem.answer)


def make_example(index: int, seed: int = 0) -> Example:
    """The pretraining example that (index, seed) stand for."""
    rng = random.Random(f"reasoner/{index}/{seed}")
    problem = draw("pretrain", index, seed)
    kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    prompt, response = _BUILDERS[kind](problem, rng)
    return Example(prompt, response, kind not in ("no_think", "guided_no_think"), kind)


def _think(problem: Problem, rng: random.Random) -> tuple[str, str]:
    return problem.prompt, work(problem.meta["steps"], rng).thinking_text


def _no_think(problem: Problem, rng: random.Random) -> tuple[str, str]:
    return problem.prompt, work(problem.meta["steps"], rng, NO_THINK).text


def _guided(problem: Problem, rng: random.Random) -> tuple[str, str]:
    demo = correct_trace(problem, rng, rng.choice((NOISY, NOISY, SURE))).thinking_text
    target = work(problem.meta["steps"], rng, SURE).thinking_text
    return reprompt(problem, solution=demo, preset=rng.choice(GUIDED_PRESETS)), target


def _guided_answer(problem: Problem, rng: random.Random) -> tuple[str, str]:
    demo = f"The answer is \\boxed{{{problem.answer}}}."
    preset = rng.choice(GUIDED_PRESETS)
    return reprompt(problem, solution=demo, preset=preset), _answer_known(
        problem, rng
    ).thinking_text


def _guided_worked(problem: Problem, rng: random.Random) -> tuple[str, str]:
    target = work(problem.meta["steps"], rng, SURE).thinking_text
    preset = rng.choice(GUIDED_PRESETS)
    return reprompt(problem, solution=problem.solution, preset=preset), target


def _guided_no_think(problem: Problem, rng: random.Random) -> tuple[str, str]:
    demo = correct_trace(problem, rng, rng.choice((NO_THINK, SURE))).text
    return reprompt(problem, solution=demo), work(problem.meta["steps"], rng, SURE).text


def _guided_uncertain(problem: Problem, rng: random.Random) -> tuple[str, str]:
    demo = correct_trace(problem, rng).thinking_text
    prompt = reprompt(
        problem, solution=demo, preset=rng.choice(("uncertainty", "hint_uncertainty"))
    )
    return prompt, work(problem.meta["steps"], rng, UNCERTAIN).thinking_text


def _feedback(problem: Problem, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        text = f"Your answer is incorrect. The correct answer is {problem.answer}."
        return reprompt(problem, feedback=text), _answer_known(problem, rng).thinking_text
    text = (
        "Your answer had the wrong format. The solution must be given in the format: "
        "\\boxed{your_answer}."
    )
    return reprompt(problem, feedback=text), work(problem.meta["steps"], rng).thinking_text


def make_drill(index: int, seed: int = 0, problems: int = 3) -> list[tuple[str, bool]]:
    """Facts without noise: (text, is it to be learnt) for the steps of a few problems.

    Pretraining starts on these, as a pupil starts with tables: what is learnt is the right value of
    each step and the careful way to it.
    """
    rng = random.Random(f"drill/{index}/{seed}")
    spans: list[tuple[str, bool]] = []
    for k in range(problems):
        steps = draw("pretrain", index * problems + k, seed + 1).meta["steps"]
        values: list[Value] = []
        for op, a, b in steps:
            a, b = resolve(a, values), resolve(b, values)
            values.append(apply_op(op, a, b))
            question, sign, _ = render_step(op, a, b, values[-1]).rpartition("=")
            if not sign:
                continue  # comparisons are learnt in context
            answer = str(values[-1])
            parts = careful_parts(op, a, b)
            if parts and rng.random() < 0.4:
                answer += f"{rng.choice(CHECKS)}{', '.join([*parts, answer])}"
            spans += [(question + sign, False), (answer + "\n", True)]
    return spans


_BUILDERS = {
    "think": _think,
    "no_think": _no_think,
    "guided": _guided,
    "guided_answer": _guided_answer,
    "guided_worked": _guided_worked,
    "guided_no_think": _guided_no_think,
    "guided_uncertain": _guided_uncertain,
    "feedback": _feedback,
}
