"""Seeded arithmetic problems that can be checked: the data of the embedded default.

Each problem is a short program (a list of steps over small integers) with a question in words. A
problem is a pure function of (split, index, seed); train and test never share one, whatever the
seeds, because the hash of a question decides which side it belongs to. Does not simulate anybody
solving them: that is `sdjax.data.reasoner`.

    train        chains, sums, remainders, comparisons, small stories; 2-5 steps with numbers below
                 100, of which the second in each step is a digit
    test         the same distribution, other problems
    ood_steps    chains, sums and remainders with 4-7 steps
    ood_large    the same families with numbers below 200, both of two digits and more
    ood_family   other families: days of the week, number sequences, unknown numbers
    pretrain     a mixture of all the distributions above, from the train side only
    easy         one sum or difference of numbers up to 20, in plain English, for pretrained models
                 that know little arithmetic (configs/smollm2.py)
    easy_test    the same distribution, other problems
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence

from sdjax.data.prompts import BOXED
from sdjax.records import Problem

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = ("Tom", "Ana", "Sam", "Mia")
ITEMS = ("apples", "cards", "coins", "books")
LEVELS = (1, 2, 3)
TEST_SHARE = 8  # one question in eight is on the test side
GIVE_UP = 5000  # repeated questions in a row after which a split counts as exhausted

Operand = int | str  # a number, a word, or "#k" for the value of step k
Step = tuple[str, Operand, Operand]
Value = int | str


@dataclasses.dataclass(frozen=True)
class Size:
    """How hard a problem may be: its level (1-3, or 4-6 for more steps) and how large its numbers.

    `top` bounds all values, `operand` the second number of a sum or difference, `factor` the first
    of a product.
    """

    level: int
    top: int
    operand: int
    factor: int


def apply_op(op: str, a: Value, b: Value) -> Value:
    """The true value of one step; `day` counts `b` days on from the day `a`."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if op == "mod":
        return a % b
    if op == "max":
        return max(a, b)
    if op == "day":
        return DAYS[(DAYS.index(a) + b) % 7]
    raise ValueError(f"unknown operation {op!r} in a synthetic problem")


def resolve(operand: Operand, values: Sequence[Value]) -> Value:
    """The number behind an operand: itself, or for "#k" the value that step k came to."""
    if isinstance(operand, str) and operand.startswith("#"):
        return values[int(operand[1:])]
    return operand


def run_steps(steps: Sequence[Step]) -> list[Value]:
    """True values of all the steps, in order."""
    values: list[Value] = []
    for op, a, b in steps:
        values.append(apply_op(op, resolve(a, values), resolve(b, values)))
    return values


def render_step(op: str, a: Value, b: Value, value: Value) -> str:
    """One step as it is written in a solution: `47+38=85`, `85 mod 7=1`, `54>52`."""
    if op == "max":
        return f"{value}>{b if value == a else a}"
    if op == "mod":
        return f"{a} mod {b}={value}"
    return f"{a}{'+' if op == 'day' else op}{b}={value}"


# ------------------------------------------------------------------------------------- families


def _operation(rng: random.Random, value: int, size: Size, ops: str) -> tuple[str, int]:
    """An operation that keeps a running value within 0..top."""
    while True:
        op = rng.choice(ops)
        if op == "*" and value > size.factor:
            continue
        b = rng.randint(2, 9 if op == "*" else size.operand)
        if 0 <= apply_op(op, value, b) <= size.top:
            return op, b


def chain(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """Start with a number and apply operations one after the other."""
    verbs = {"+": "add", "-": "subtract", "*": "multiply by"}
    value = start = rng.randint(2, size.factor)
    steps, words = [], []
    for i in range(size.level + 1):
        op, b = _operation(rng, value, size, "+-**")
        steps.append((op, f"#{i - 1}" if i else start, b))
        words.append(f"{verbs[op]} {b}")
        value = apply_op(op, value, b)
    return f"Start with {start}, {', '.join(words)}. Find the result.", steps


def signed_sum(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """A sum and difference of several numbers, full of carries."""
    value = start = rng.randint(size.top // 9, size.top - size.operand)
    text, steps = str(start), []
    for i in range(size.level + 1):
        op, b = _operation(rng, value, size, "+-")
        steps.append((op, f"#{i - 1}" if i else start, b))
        text += f"{op}{b}"
        value = apply_op(op, value, b)
    return f"Compute {text}.", steps


def remainder(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """The remainder of an expression modulo a digit."""
    modulus = rng.randint(3, 9)
    if size.level == 1:
        a, b = rng.randint(2, size.factor), rng.randint(2, 9)
        text, steps = f"{a}*{b}", [("*", a, b)]
    else:
        small = dataclasses.replace(size, top=size.top // 2)
        value = a = rng.randint(5, small.top - size.operand // 2)
        text, steps = str(a), []
        for i in range(size.level - 1):
            op, b = _operation(rng, value, small, "+-")
            steps.append((op, f"#{i - 1}" if i else a, b))
            text += f"{op}{b}"
            value = apply_op(op, value, b)
    return f"Find ({text}) mod {modulus}.", [*steps, ("mod", f"#{len(steps) - 1}", modulus)]


def _pair(rng: random.Random, size: Size, product: bool) -> Step:
    """A sum or a product of two numbers that stays within `top`."""
    if product:
        return ("*", rng.randint(3, size.factor), rng.randint(3, 9))
    b = rng.randint(2, size.operand)
    return ("+", rng.randint(5, size.top - b), b)


def comparison(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """The larger of two (from level 3 on, three) expressions; the answer is its value."""
    pairs = [_pair(rng, size, rng.random() < 0.4) for _ in range(2 + (size.level > 2))]
    texts = [f"{a}{op}{b}" for op, a, b in pairs]
    steps: list[Step] = [*pairs, ("max", "#0", "#1")]
    if len(pairs) == 3:
        steps.append(("max", "#3", "#2"))
    return f"Which is larger, {' or '.join(texts)}? Find the larger value.", steps


def story(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """A small word problem."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    b, c = rng.randint(2, 9), rng.randint(2, 9)
    if size.level == 1:
        a, more = rng.randint(2, size.factor), rng.randint(2, size.operand)
        question = f"{name} reads {a} pages a day for {b} days, then {more} more. How many pages?"
        return question, [("*", a, b), ("+", "#0", more)]
    if size.level == 2:
        a, more = rng.randint(5, size.top // 2 - size.operand), rng.randint(2, size.operand)
        people = rng.randint(3, 9)
        question = (
            f"{name} has {a} {item}, gets {more} and shares all with {people} friends. "
            "How many are left over?"
        )
        return question, [("+", a, more), ("mod", "#0", people)]
    a = rng.randint(2, size.operand)
    lost = rng.randint(2, min(size.operand, a + b * c))
    question = f"{name} has {a} {item}, buys {b} boxes of {c} and loses {lost}. How many are left?"
    return question, [("*", b, c), ("+", "#0", a), ("-", "#1", lost)]


def weekday(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """Which day it is some weeks on; the answer is a word."""
    small = dataclasses.replace(size, top=size.top // 2)
    op, a, b = _pair(rng, small, product=size.level > 1)
    start = rng.choice(DAYS)
    question = f"What day is {a}{op}{b} days after {start}?"
    return question, [(op, a, b), ("mod", "#0", 7), ("day", start, "#1")]


def sequence(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """A later term of an arithmetic sequence of which the first two are given."""
    gap, term, first = rng.randint(2, 9), rng.randint(4, 10), rng.randint(1, size.operand)
    question = f"A sequence starts {first}, {first + gap}. Find term {term}."
    return question, [
        ("-", first + gap, first),
        ("*", "#0", term - 1),
        ("+", "#1", first),
    ]


def unknown(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """A number to which something was added and subtracted; undo it."""
    b, c = rng.randint(2, size.operand), rng.randint(2, size.operand)
    a = rng.randint(c, size.top - b)
    question = f"A number plus {b} minus {c} is {a + b - c}. Find the number."
    return question, [("+", a + b - c, c), ("-", "#0", b)]


def single(rng: random.Random, size: Size) -> tuple[str, list[Step]]:
    """One sum or difference of two numbers, as a plain question or a story of one sentence."""
    op, b = rng.choice("+-"), rng.randint(2, size.operand)
    a = rng.randint(b + 1, size.top - b if op == "+" else size.top)
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    plain = rng.random() < 0.5
    if op == "+":
        story = f"{name} has {a} {item} and gets {b} more. How many {item} are there now?"
        return f"What is {a} plus {b}?" if plain else story, [(op, a, b)]
    story = f"{name} has {a} {item} and gives {b} away. How many {item} are left?"
    return f"What is {a} minus {b}?" if plain else story, [(op, a, b)]


Family = Callable[[random.Random, Size], tuple[str, list[Step]]]
FAMILIES: dict[str, Family] = {
    "chain": chain,
    "sum": signed_sum,
    "remainder": remainder,
    "comparison": comparison,
    "story": story,
    "weekday": weekday,
    "sequence": sequence,
    "unknown": unknown,
    "single": single,
}


# --------------------------------------------------------------------------------------- splits


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Families and levels of one split, and how large its numbers are (see `Size`)."""

    families: tuple[str, ...]
    levels: tuple[int, ...]
    top: int = 99
    operand: int = 9
    factor: int = 10


TRAIN = Distribution(("chain", "sum", "remainder", "comparison", "story"), LEVELS)
EASY = Distribution(("single",), (1,), top=20)
DISTRIBUTIONS: dict[str, Distribution] = {
    "train": TRAIN,
    "test": TRAIN,
    "ood_steps": Distribution(("chain", "sum", "remainder"), (4, 5, 6)),
    "ood_large": Distribution(("chain", "sum", "comparison", "story"), LEVELS, 199, 60, 25),
    "ood_family": Distribution(("weekday", "sequence", "unknown"), LEVELS),
    "easy": EASY,
    "easy_test": EASY,
}
TRAIN_SIDE = ("train", "pretrain", "easy")  # the other splits are for evaluation
PRETRAIN_MIX = {"train": 0.8, "ood_steps": 0.06, "ood_large": 0.08, "ood_family": 0.06}
SPLITS = (*DISTRIBUTIONS, "pretrain")


def is_test_side(question: str) -> bool:
    """Whether a question belongs to the evaluation side; a pure function of its text."""
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % TEST_SHARE == 0


def solution_text(steps: Sequence[Step]) -> str:
    """The worked solution of a problem, without any thinking aloud."""
    values = run_steps(steps)
    lines = [
        render_step(op, resolve(a, values), resolve(b, values), value)
        for (op, a, b), value in zip(steps, values, strict=True)
    ]
    return "\n".join(lines) + f"\n\nThe answer is \\boxed{{{values[-1]}}}."


def draw(split: str, index: int, seed: int = 0, level: int | None = None) -> Problem:
    """The problem that (split, index, seed) stand for; two indices may give the same question.

    `level` fixes the level instead of drawing it. Raises ValueError for an unknown split or level.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown synthetic split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{index}/{seed}")
    name = split
    if split == "pretrain":
        name = rng.choices(tuple(PRETRAIN_MIX), tuple(PRETRAIN_MIX.values()))[0]
    dist = DISTRIBUTIONS[name]
    if level is not None and level not in dist.levels:
        raise ValueError(
            f"level {level} is not in the synthetic split {name!r}: choose one of {dist.levels}"
        )
    family = rng.choice(dist.families)
    level = rng.choice(dist.levels) if level is None else level
    size = Size(level, dist.top, dist.operand, dist.factor)
    while True:
        question, steps = FAMILIES[family](rng, size)
        if is_test_side(question) == (split not in TRAIN_SIDE):
            break
    return Problem(
        id=f"synthetic/{split}/{seed}/{index}",
        prompt=question + BOXED,
        answer=str(run_steps(steps)[-1]),
        solution=solution_text(steps),
        meta={"family": family, "level": size.level, "distribution": name, "steps": steps},
    )


def stream(split: str, seed: int = 0, level: int | None = None) -> Iterator[Problem]:
    """Distinct problems in the order of their index.

    Raises ValueError when the split has no more: after GIVE_UP repetitions in a row.
    """
    seen: set[str] = set()
    index = last = 0
    while index - last < GIVE_UP:
        problem = draw(split, index, seed, level)
        index += 1
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            last = index
            yield problem
    raise ValueError(
        f"the synthetic split {split!r} has only about {len(seen)} distinct problems: ask for "
        "fewer (config.eval.problems, config.data.synthetic_size)"
    )


def make_problems(split: str, n: int, seed: int = 0, level: int | None = None) -> list[Problem]:
    """The first `n` distinct problems of a split; a longer list starts with the shorter one."""
    source = stream(split, seed, level)
    return [next(source) for _ in range(n)]
