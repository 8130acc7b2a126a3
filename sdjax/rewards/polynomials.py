"""Rational functions with exact coefficients, just enough to clear denominators of equations.

`xy = 6` and `y = 6/x` differ by a factor that is not constant; their numerators are proportional.
A polynomial is a dict from exponents (one per variable) to a Fraction; sizes are bounded.
"""

from __future__ import annotations

from fractions import Fraction

from sdjax.rewards.nodes import Node, TooBig, Unreadable, symbols

Polynomial = dict[tuple[int, ...], Fraction]
MAX_TERMS = 300
MAX_DEGREE = 24


def same_zeros(left: Node, right: Node) -> bool:
    """Whether two expressions have proportional numerators; raises Unreadable, TooBig."""
    names = sorted(symbols(left) | symbols(right))
    a, _ = _rational(left, names)
    b, _ = _rational(right, names)
    if not a or not b or a.keys() != b.keys():
        return False
    ratios = {a[key] / b[key] for key in a}
    return len(ratios) == 1


def _rational(node: Node, names: list[str]) -> tuple[Polynomial, Polynomial]:
    """(numerator, denominator) without cancelling."""
    zero = (0,) * len(names)
    if node.op == "num":
        return ({zero: node.args[0]} if node.args[0] else {}), {zero: Fraction(1)}
    if node.op == "sym" and node.args[0] in names:
        exponents = tuple(int(name == node.args[0]) for name in names)
        return {exponents: Fraction(1)}, {zero: Fraction(1)}
    if node.op == "group":
        return _rational(node.args[0], names)
    if node.op == "neg":
        top, bottom = _rational(node.args[0], names)
        return {key: -value for key, value in top.items()}, bottom
    if node.op == "add":
        return _sum([_rational(arg, names) for arg in node.args])
    if node.op in ("mul", "div"):
        (a, b), (c, d) = (_rational(arg, names) for arg in node.args)
        if node.op == "div":
            c, d = d, c
        return _times(a, c), _times(b, d)
    if node.op == "pow":
        return _power(*_rational(node.args[0], names), node.args[1], zero)
    raise Unreadable(f"no polynomial: {node.op}")


def _power(top: Polynomial, bottom: Polynomial, exponent: Node, zero) -> tuple:
    while exponent.op == "group":
        exponent = exponent.args[0]
    negative = exponent.op == "neg"
    if negative:
        exponent = exponent.args[0]
    if exponent.op != "num" or exponent.args[0].denominator != 1:
        raise Unreadable("power of a polynomial")
    count = int(exponent.args[0])
    if count > MAX_DEGREE:
        raise TooBig("degree")
    if negative:
        top, bottom = bottom, top
    results = []
    for factor in (top, bottom):
        result: Polynomial = {zero: Fraction(1)}
        for _ in range(count):
            result = _times(result, factor)
        results.append(result)
    return tuple(results)


def _sum(parts: list[tuple[Polynomial, Polynomial]]) -> tuple[Polynomial, Polynomial]:
    top, bottom = parts[0]
    for other_top, other_bottom in parts[1:]:
        if other_bottom == bottom:
            top = _plus(top, other_top)
        else:
            top = _plus(_times(top, other_bottom), _times(other_top, bottom))
            bottom = _times(bottom, other_bottom)
    return top, bottom


def _plus(a: Polynomial, b: Polynomial) -> Polynomial:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, Fraction(0)) + value
    return {key: value for key, value in total.items() if value}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) * len(b) > MAX_TERMS**2 // 4:
        raise TooBig("polynomial")
    product: Polynomial = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(map(sum, zip(left, right, strict=True)))
            product[key] = product.get(key, Fraction(0)) + x * y
    if len(product) > MAX_TERMS or any(max(key, default=0) > 2 * MAX_DEGREE for key in product):
        raise TooBig("polynomial")
    return {key: value for key, value in product.items() if value}
