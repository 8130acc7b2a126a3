r"""math-verify, the second opinion on what our own reader cannot read: sums, new notation.

It is asked rarely and believed reluctantly. Static guards refuse whatever could be slow or could
make it pick a number out of a formula it failed to parse; afterwards a veto demands that both sides
parsed to the same kind of object with the same symbols, and that they agree to 30 digits. Parsed
objects are never printed, because printing evaluates. No text is evaluated: math-verify's LaTeX
grammar builds the expressions.
"""

from __future__ import annotations

import logging
import random
import re

from sdjax.rewards.vocabulary import COMMANDS as OURS
from sdjax.rewards.vocabulary import HEDGES
from sdjax.rewards.worker import need_heavy_imports

MAX_CHARS = 250
MAX_NESTING = 8
MAX_POWERS = 10
DIGITS = 30
LIMIT = 10.0**-25
HEAVY = ("sum", "prod", "int", "iint", "oint", "lim", "infty", "frac", "sqrt")
# what our reader lacks and math-verify's grammar has; any other command is a macro or a typo
ITS_OWN = frozenset(
    "sum prod int iint iiint oint lim limsup liminf partial nabla nicefrac sfrac overset underset "
    "stackrel substack erf det rank arg sup inf sgn cases aligned forall exists subset subseteq "
    "supset supseteq notin complement perp parallel cong propto implies iff Rightarrow rightarrow "
    "Leftrightarrow mapsto land lor neg top bot aleph wp dagger star oplus otimes circ".split()
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[A-Za-z]{2,}")
_BIG = re.compile(
    r"\d{7,}|!|\^\s*\{?\s*-?\d{3,}|\\(?:pm|mp|approx|sim|text|mbox|neq?|ldots|dots)\b"
)
_BASE = re.compile(r"\d\s*\}?\s*_")


def fallback_equal(answer: str, gold: str) -> tuple[bool, str]:
    """(verdict, reason) by math-verify behind the guards and the veto."""
    if (refusal := refused(answer, gold)) is not None:
        return False, refusal
    try:
        return _compare(answer, gold)
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return False, "unreadable"


def refused(answer: str, gold: str) -> str | None:
    """Why this pair is not for math-verify, or None."""
    if (
        len(answer) > MAX_CHARS
        or len(gold) > MAX_CHARS
        or not answer.isascii()
        or not answer.isprintable()
    ):
        return "unreadable"
    if _nesting(answer) > MAX_NESTING or answer.count("^") > MAX_POWERS:
        return "too_big"
    if _BIG.search(answer) or _BASE.search(answer):
        return "unreadable"
    commands = {text: set(_COMMAND.findall(text)) for text in (answer, gold)}
    if not commands[answer] <= ITS_OWN | OURS:
        return "unreadable"
    heavy = [{name for name in commands[text] if name in HEAVY[:6]} for text in (answer, gold)]
    if heavy[0] != heavy[1]:
        return "unreadable"  # an unevaluated sum is no answer unless the gold is one
    words = {word.lower() for word in _WORD.findall(_COMMAND.sub(" ", answer))}
    if words & HEDGES or any(len(word) > 3 for word in words):
        return "unreadable"
    if _separators(answer) != _separators(gold):
        return "unreadable"
    return None


def _separators(text: str) -> tuple[int, ...]:
    """Counts of what divides an answer: both sides must have the same shape."""
    return tuple(text.count(mark) for mark in (",", ";", "=", "<", ">", "|", "&", "\\in", "\\cup"))


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def import_math_verify():
    """The module, loaded outside any deadline and without its warning at every call."""
    need_heavy_imports()
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


def _compare(answer: str, gold: str) -> tuple[bool, str]:
    math_verify = import_math_verify()
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        math_verify.parse(
            f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None
        )
        for text in (gold, answer)
    ]
    if not all(parsed):
        return False, "unreadable"
    if not math_verify.verify(*parsed, strict=True, float_rounding=15, timeout_seconds=None):
        return False, "fallback_different"
    return (True, "fallback_equal") if _agree(parsed[0][0], parsed[1][0]) else (False, "vetoed")


def _agree_in_parts(gold, answer) -> bool:
    """Relations side by side; of sets every member must find its own."""
    import sympy

    if type(gold) is not type(answer) or len(gold.args) != len(answer.args) or not gold.args:
        return False
    if not isinstance(gold, sympy.FiniteSet):
        return all(_agree(a, b) for a, b in zip(gold.args, answer.args, strict=True))
    left = list(answer.args)
    for member in gold.args:
        found = next((other for other in left if _agree(member, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _agree(gold, answer) -> bool:
    """Same kind, same symbols, and the same values to 30 digits at random points."""
    import sympy

    if isinstance(gold, str) or isinstance(answer, str):
        return False
    if isinstance(gold, sympy.Expr) != isinstance(answer, sympy.Expr):
        return False
    if not isinstance(gold, sympy.Expr):
        return gold == answer or _agree_in_parts(gold, answer)
    if gold.free_symbols != answer.free_symbols:
        return False
    heavy = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)
    if gold.has(*heavy) or answer.has(*heavy):
        return True
    rng = random.Random(0)
    for _ in range(3):
        point = {s: sympy.Rational(rng.randint(100, 999), 313) for s in gold.free_symbols}
        a, b = (side.subs(point).evalf(DIGITS, maxn=200) for side in (gold, answer))
        if not (a.is_number and b.is_number) or abs(a - b) > LIMIT * (1 + abs(a)):
            return False
    return True
