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
POINTS = 5
ATTEMPTS = 14


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
        digits = 100 * (1 + (DIGITS + 30 + 2 * scope.span) // 100)
        if digits > MAX_DIGITS:
            raise TooBig("precision")
    return True


def _close(a: Value, b: Value, scope: Scope) -> bool:
    """Agreement to the working precision, relative to the largest magnitude on the way."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    ctx = scope.ctx
    unit = ctx.ldexp(ctx.mpf(1), scope.largest)
    return abs(scope.real(a) - scope.real(b)) <= unit * ctx.mpf(10) ** (GUARD - scope.digits)


def _points(variables: list[str]):
    """Seeded rational points: positive ones first, then of either sign, then wider ones."""
    rng = random.Random("\x1f".join(variables))
    for attempt in range(ATTEMPTS):
        scale = (3, 3, 7, 2, 40)[attempt % 5]
        point = {}
        for name in variables:
            value = Fraction(rng.randint(1000, 999_983), 999_983) * scale
            negative = attempt % 2 == 1 and rng.random() < 0.6
            point[name] = -value if negative else value
        yield point


def _at(left: Node, right: Node, point: dict, allow_complex: bool):
    """(a, b, scope) at a point, or None where either has no (real) value there."""
    scope = Scope(DIGITS, point)
    try:
        a, b = evaluate(left, scope), evaluate(right, scope)
    except Undefined:
        return None
    if not allow_complex and not (is_real(a, scope) and is_real(b, scope)):
        return None
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
