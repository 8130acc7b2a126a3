"""Are two expressions the same number, or the same function of their variables?

Constants: exact rationals are compared exactly; other values at 50 digits, then, when they agree,
again at a precision beyond every cancellation that the magnitudes on the way allow. Functions are
compared at seeded random rational points, exactly where only rational operations occur (a false
agreement of rational functions is then as unlikely as hitting a root at random).
"""

from __future__ import annotations

import random
from fractions import Fraction

from sdjax.rewards.evaluate import Scope, Value, check_size, evaluate, is_real
from sdjax.rewards.nodes import Node, TooBig, Undefined, mentions, symbols

DIGITS = 50
MAX_DIGITS = 1500
GUARD = 12  # digits lost to rounding in the evaluation itself
SPARE = 12  # orders of magnitude that 50 digits bear without a second look
POINTS = 7
# Signs of the variables and their size, one attempt after the other. Signs: all positive, all
# negative, by a bit of the variable's number (so that any two differ somewhere), at random. |y| is
# y wherever y is positive, |x - 100| is 100 - x up to there, a root has positive points only.
SMALL, WIDE = 7, 300
ATTEMPTS = (("+", 3), ("-", 3), ("0", 7), ("~0", 2), ("+", WIDE), ("-", WIDE), ("1", 40), ("+", 3))
ATTEMPTS += (("2", 7), ("+", 7), ("random", 2), ("+", 40), ("random", 3), ("+", 1), ("random", 7))
ATTEMPTS += (("+", 2), ("+", 20))


def same_value(left: Node, right: Node) -> bool | None:
    """Whether two scalar expressions are equal; None where that cannot be decided."""
    check_size(left)
    check_size(right)
    variables = sorted(symbols(left) | symbols(right))
    if not variables:
        return _same_constant(left, right)
    return _same_function(left, right, variables)


def proportional(left: Node, right: Node) -> bool | None:
    """Whether left = c * right for a constant c != 0 (equations up to a factor)."""
    ratio = constant_ratio(left, right)
    return None if ratio is None else ratio != 0


def constant_ratio(left: Node, right: Node) -> float | None:
    """c of left = c * right as a float with the right sign; 0.0 where there is none."""
    check_size(left)
    check_size(right)
    variables = sorted(symbols(left) | symbols(right))
    if not variables:
        return float(_same_constant(left, right))
    ratios = []
    for point in _points(variables):
        pair = _at(left, right, point, allow_complex=False)
        if pair is None:
            continue
        a, b, scope = pair
        if a == 0 and b == 0:
            continue
        if a == 0 or b == 0:
            return 0.0
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        ratio = a / b if exact else scope.real(a) / scope.real(b)
        if ratios and not _close(ratios[0], ratio, scope):
            return 0.0
        ratios.append(ratio)
        if len(ratios) >= POINTS:
            break
    if len(ratios) < 3:
        return None
    value = ratios[0]
    real = value if isinstance(value, Fraction) else value.real
    return 1.0 if real > 0 else -1.0


def real_constant(node: Node) -> Value | None:
    """Value of a real expression without variables, as an mpf, or None where it is none."""
    check_size(node)
    if symbols(node):
        return None
    scope = Scope(DIGITS)
    value = scope.real(evaluate(node, scope))
    return value.real if is_real(value, scope) else None


def _same_constant(left: Node, right: Node) -> bool:
    digits = DIGITS
    for _ in range(2):
        scope = Scope(digits)
        a, b = evaluate(left, scope), evaluate(right, scope)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        if not _close(a, b, scope):
            return False
        digits = _digits_beyond(scope)
    return True


def _digits_beyond(scope: Scope) -> int:
    """Precision at which no cancellation of the magnitudes seen hides a difference."""
    digits = 100 * (1 + (DIGITS + 30 + 2 * scope.span) // 100)
    if digits > MAX_DIGITS:
        raise TooBig("precision")
    return digits


def _close(a: Value, b: Value, scope: Scope) -> bool:
    """Agreement to the working precision, relative to the largest magnitude on the way."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    ctx = scope.ctx
    unit = ctx.ldexp(ctx.mpf(1), scope.largest)
    return abs(scope.real(a) - scope.real(b)) <= unit * ctx.mpf(10) ** (GUARD - scope.digits)


def _points(variables: list[str]):
    """Seeded rational points, with the signs and sizes of ATTEMPTS."""
    rng = random.Random("\x1f".join(variables))
    for signs, scale in ATTEMPTS:
        point = {}
        least = 500_000 if scale == WIDE else 1000
        for number, name in enumerate(variables):
            value = Fraction(rng.randint(least, 999_983), 999_983) * scale
            point[name] = -value if _negative(signs, number, rng) else value
        yield point


def _negative(signs: str, number: int, rng: random.Random) -> bool:
    if signs == "random":
        return rng.random() < 0.6
    if signs in "+-":
        return signs == "-"
    return (number >> int(signs[-1]) & 1) != signs.startswith("~")


def _at(left: Node, right: Node, point: dict, allow_complex: bool):
    """(a, b, scope) at a point, or None where either has no (real) value there.

    Values that may have lost digits (10^60 + x - 10^60) are taken again, precisely enough.
    """
    scope = Scope(DIGITS, point)
    try:
        a, b = evaluate(left, scope), evaluate(right, scope)
        if scope.span > SPARE and not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            scope = Scope(_digits_beyond(scope), point)
            a, b = evaluate(left, scope), evaluate(right, scope)
    except Undefined:
        return None
    except TooBig:
        if any(abs(value) > SMALL for value in point.values()):
            return None  # e^(e^x) is a giant there
        raise
    if not allow_complex and scope.left_reals:
        return None  # sqrt(a) sqrt(b) at negative a and b is a real number, but not by real ones
    return a, b, scope


def _same_function(left: Node, right: Node, variables: list[str]) -> bool | None:
    """Equal wherever both are real; at complex values where no real point was found."""
    complex_anyway = mentions(left, "i") or mentions(right, "i")
    for allow_complex in (False, True) if not complex_anyway else (True,):
        agreed = 0
        for point in _points(variables):
            pair = _at(left, right, point, allow_complex)
            if pair is None:
                continue
            a, b, scope = pair
            if not _close(a, b, scope):
                return False
            agreed += 1
            if agreed >= POINTS:
                return True
        if agreed >= 3:
            return True
    return None
