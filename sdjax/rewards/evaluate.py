"""Bounded evaluation of a tree: exact rationals as long as possible, mpmath beyond.

Every operation checks the size of its result before computing it, so that no answer can cost more
than milliseconds; over a bound `TooBig` is raised. `Scope` records the span of magnitudes met on
the way: how many digits a comparison needs to be sure that nothing was lost in a sum.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
from mpmath.libmp import ComplexResult, NoConvergence

from sdjax.rewards.nodes import Node, TooBig, Undefined, Unreadable, walk

Value = Any  # Fraction, or mpf and mpc of a context
MAX_BITS = 60_000  # of an exact rational
MAX_MAGNITUDE = 200_000  # binary exponent of a real number
MAX_FACTORIAL = 3_000
MAX_GAMMA_DIGITS = 300  # the gamma function takes a second at 800
MAX_NODES = 500


@functools.lru_cache(maxsize=16)
def _context(digits: int) -> mpmath.MPContext:
    """A private context, so that nobody's global precision is touched; making one costs 1 ms."""
    ctx = mpmath.MPContext()
    ctx.dps = digits
    return ctx


class Scope:
    """Values of the variables, the working precision, and the magnitudes seen."""

    def __init__(self, digits: int, variables: dict[str, Value] | None = None) -> None:
        self.ctx = _context(digits)
        self.digits = digits
        self.variables = variables or {}
        self.radians = False
        self.largest = 0
        self.smallest = 0
        self.left_reals = False  # some intermediate value was not real

    def real(self, value: Value):
        """The value as a number of mpmath."""
        if isinstance(value, Fraction):
            return self.ctx.mpf(value.numerator) / value.denominator
        return value

    def note(self, value: Value) -> Value:
        """Record the magnitude of an intermediate result and refuse giants."""
        if isinstance(value, Fraction):
            if not value:
                return value
            if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
                raise TooBig("rational")
            magnitude = value.numerator.bit_length() - value.denominator.bit_length()
        else:
            if not self.ctx.isfinite(value):
                raise Undefined("not finite")
            if value == 0:
                return value
            if not self.left_reals and isinstance(value, self.ctx.mpc):
                self.left_reals = not is_real(value, self)
            magnitude = int(self.ctx.mag(value))
            if abs(magnitude) > MAX_MAGNITUDE:
                raise TooBig("magnitude")
        self.largest = max(self.largest, magnitude)
        self.smallest = min(self.smallest, magnitude)
        return value

    @property
    def span(self) -> int:
        """Decimal digits between the largest and the smallest magnitude seen."""
        return int((self.largest - self.smallest) * 0.30103) + 1


def evaluate(node: Node, scope: Scope) -> Value:
    """Value of an expression; raises Unreadable, TooBig or Undefined (all ValueErrors)."""
    try:
        return scope.note(_OPERATIONS[node.op](node.args, scope))
    except KeyError:
        raise Unreadable(f"no value for {node.op}") from None
    except (ZeroDivisionError, OverflowError, NoConvergence, ComplexResult) as error:
        raise Undefined(str(error)) from None


def check_size(node: Node) -> None:
    """Refuse trees with too many nodes before anything is computed."""
    for count, _ in enumerate(walk(node)):
        if count > MAX_NODES:
            raise TooBig("expression")


def is_real(value: Value, scope: Scope) -> bool:
    """Whether the imaginary part is zero to within the working precision."""
    if isinstance(value, Fraction):
        return True
    return abs(value.imag) <= abs(value) * scope.ctx.mpf(10) ** (8 - scope.digits)


def _exact(*values: Value) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def _integer(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise Undefined("integer expected")
    return value.numerator


def _num(args, scope):
    return args[0]


def _sym(args, scope):
    name = args[0]
    if name == "pi":
        return +scope.ctx.pi
    if name == "e":
        return +scope.ctx.e
    if name == "i":
        return scope.ctx.mpc(0, 1)
    try:
        return scope.variables[name]
    except KeyError:
        raise Unreadable(f"variable {name}") from None


def _group(args, scope):
    return evaluate(args[0], scope)


def _add(args, scope):
    total: Value = Fraction(0)
    for arg in args:
        term = evaluate(arg, scope)
        total = total + term if _exact(total, term) else scope.real(total) + scope.real(term)
        scope.note(total)
    return total


def _neg(args, scope):
    return -evaluate(args[0], scope)


def _mul(args, scope):
    left, right = (evaluate(arg, scope) for arg in args)
    return left * right if _exact(left, right) else scope.real(left) * scope.real(right)


def _div(args, scope):
    top, bottom = (evaluate(arg, scope) for arg in args)
    if _vanishes(bottom, scope):
        raise Undefined("division by zero")
    return top / bottom if _exact(top, bottom) else scope.real(top) / scope.real(bottom)


def _vanishes(value: Value, scope: Scope) -> bool:
    """Zero, or so near zero that only cancellation can have made it."""
    if isinstance(value, Fraction):
        return value == 0
    limit = scope.smallest - 3.2 * scope.digits
    return value == 0 or int(scope.ctx.mag(value)) < limit


def _pow(args, scope):
    base, exponent = evaluate(args[0], scope), evaluate(args[1], scope)
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _integer_power(base, exponent.numerator, scope)
    if _exact(base, exponent) and base >= 0:
        root = _exact_root(base, exponent.denominator)
        if root is not None:
            return _integer_power(root, exponent.numerator, scope)
    return _real_power(base, exponent, scope)


def _integer_power(base: Value, exponent: int, scope: Scope) -> Value:
    if base == 0:
        if exponent <= 0:
            raise Undefined("zero to the power zero or less")
        return Fraction(0)
    if isinstance(base, Fraction):
        if base in (1, -1):
            return base if exponent % 2 else Fraction(1)
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS:
            raise TooBig("power")
        return base**exponent
    if (abs(int(scope.ctx.mag(base))) + 1) * abs(exponent) > MAX_MAGNITUDE:
        raise TooBig("power")
    return scope.ctx.power(base, exponent)


def _real_power(base: Value, exponent: Value, scope: Scope) -> Value:
    base, exponent = scope.real(base), scope.real(exponent)
    if base == 0:
        if is_real(exponent, scope) and exponent.real > 0:
            return Fraction(0)
        raise Undefined("power of zero")
    if abs(exponent) * (abs(int(scope.ctx.mag(base))) + 2) > MAX_MAGNITUDE:
        raise TooBig("power")
    return scope.ctx.power(base, exponent)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational `degree`-th root of a non-negative rational, if there is one."""
    if degree > 64:
        return None
    roots = [_integer_root(part, degree) for part in (value.numerator, value.denominator)]
    return None if None in roots else Fraction(*roots)


def _integer_root(value: int, degree: int) -> int | None:
    if value < 2:
        return value
    if degree == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    root = 1 << (value.bit_length() // degree + 1)
    while True:  # Newton from above ends at the floor of the root
        lower = ((degree - 1) * root + value // root ** (degree - 1)) // degree
        if lower >= root:
            break
        root = lower
    return root if root**degree == value else None


def _root(args, scope):
    radicand, index = evaluate(args[0], scope), evaluate(args[1], scope)
    degree = _integer(index)
    if not 1 <= degree <= 1000:
        raise TooBig("root")
    if isinstance(radicand, Fraction):
        sign = -1 if radicand < 0 else 1
        if sign > 0 or degree % 2:  # an odd root of a negative number is the real one
            if (root := _exact_root(abs(radicand), degree)) is not None:
                return sign * root
            return sign * scope.ctx.root(scope.real(abs(radicand)), degree)
    radicand = scope.real(radicand)
    if degree % 2 and is_real(radicand, scope) and radicand.real < 0:
        return -scope.ctx.root(-radicand.real, degree)
    return scope.ctx.root(radicand, degree)


def _fact(args, scope):
    value = evaluate(args[0], scope)
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise Undefined("factorial of a negative number")
        if value > MAX_FACTORIAL:
            raise TooBig("factorial")
        return Fraction(math.factorial(value.numerator))
    value = scope.real(value)
    if abs(value) > MAX_FACTORIAL or scope.digits > MAX_GAMMA_DIGITS:
        raise TooBig("factorial")
    return scope.ctx.gamma(value + 1)


def _binom(args, scope):
    top, bottom = (evaluate(arg, scope) for arg in args)
    if _exact(top, bottom) and bottom.denominator == 1:
        k = bottom.numerator
        if top.denominator == 1 and top >= 0:
            n = top.numerator
            k = min(k, n - k)
            if k < 0:
                return Fraction(0)
        if k < 0 or k * max(top.numerator.bit_length(), 8) > MAX_BITS or k > 3000:
            raise TooBig("binomial")
        return math.prod((top - j for j in range(k)), start=Fraction(1)) / math.factorial(k)
    top, bottom = scope.real(top), scope.real(bottom)
    if abs(top) + abs(bottom) > MAX_FACTORIAL or scope.digits > MAX_GAMMA_DIGITS:
        raise TooBig("binomial")
    return scope.ctx.binomial(top, bottom)


def _abs(args, scope):
    return abs(evaluate(args[0], scope))


def _rounded(direction: Callable) -> Callable:
    def apply(args, scope):
        value = evaluate(args[0], scope)
        if isinstance(value, Fraction):
            return Fraction(direction(value))
        if not is_real(value, scope):
            raise Undefined("rounding a complex number")
        value = value.real
        nearest = scope.ctx.nint(value)
        if abs(value - nearest) < scope.ctx.mpf(10) ** (10 - scope.digits):
            return Fraction(int(nearest))
        return Fraction(int(scope.ctx.floor(value)) + (direction is math.ceil))

    return apply


def _mod(args, scope):
    value, modulus = (evaluate(arg, scope) for arg in args)
    if not _exact(value, modulus) or modulus == 0:
        raise Undefined("modulus")
    return value % modulus


def _deg(args, scope):
    value = evaluate(args[0], scope)
    return scope.real(value) * scope.ctx.pi / 180 if scope.radians else value


def _part(name: str) -> Callable:
    def apply(args, scope):
        value = evaluate(args[0], scope)
        if isinstance(value, Fraction):
            return value if name == "Re" else Fraction(0)
        return value.real if name == "Re" else value.imag

    return apply


def _call(args, scope):
    name, *arguments = args
    if name in ("gcd", "lcm", "min", "max"):
        return _list_call(name, [evaluate(arg, scope) for arg in arguments])
    outer, scope.radians = scope.radians, name in _TRIGONOMETRIC
    value = evaluate(arguments[0], scope)
    scope.radians = outer
    if name in ("log", "ln"):
        return _log(value, arguments[1:], scope)
    if len(arguments) > 1:
        raise Unreadable(f"subscript of {name}")
    value = scope.real(value)
    if name == "exp":
        if abs(value) > MAX_MAGNITUDE:
            raise TooBig("exp")
        return scope.ctx.exp(value)
    if int(scope.ctx.mag(value)) > 400 if value != 0 else False:
        raise TooBig("argument of a periodic function")
    if name in ("sinh", "cosh", "tanh", "sech", "csch", "coth") and abs(value) > 10_000:
        raise TooBig("hyperbolic argument")
    if name == "cis":
        return scope.ctx.expj(value)
    if name not in _FUNCTIONS:
        raise Unreadable(f"function {name}")
    return _pole_checked(name, value, scope)


def _pole_checked(name: str, value, scope: Scope):
    """The function's value, refusing the neighbourhood of a pole that rounding hides."""
    result = getattr(scope.ctx, _FUNCTIONS[name])(value)
    if (
        scope.ctx.isfinite(result)
        and name in _WITH_POLES
        and abs(result) > 10 ** (scope.digits // 2)
    ):
        raise Undefined("pole")
    return result


def _log(value: Value, base_nodes: list[Node], scope: Scope) -> Value:
    if _vanishes(value, scope):
        raise Undefined("logarithm of zero")
    if not base_nodes:
        return scope.ctx.ln(scope.real(value))
    base = evaluate(base_nodes[0], scope)
    if _vanishes(base, scope) or base == 1:
        raise Undefined("base of a logarithm")
    return scope.ctx.ln(scope.real(value)) / scope.ctx.ln(scope.real(base))


def _list_call(name: str, values: list[Value]) -> Value:
    if name in ("gcd", "lcm"):
        integers = [_integer(value) for value in values]
        return Fraction(math.gcd(*integers) if name == "gcd" else math.lcm(*integers))
    if not _exact(*values):
        raise Unreadable("minimum of irrational numbers")
    return min(values) if name == "min" else max(values)


def _app(args, scope):
    """Unknown functions get a value that depends on name and arguments only."""
    name, *arguments = args
    parts = [name]
    for arg in arguments:
        value = evaluate(arg, scope)
        parts.append(str(value) if isinstance(value, Fraction) else scope.ctx.nstr(value, 20))
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return Fraction(int.from_bytes(digest[:5], "big") + 1, 1 << 38)


def _det(args, scope):
    rows = [[evaluate(item, scope) for item in row] for row in args]
    if len(rows) != len(rows[0]) or len(rows) > 4:
        raise TooBig("determinant")
    return _minor(rows, scope)


def _minor(rows, scope):
    if len(rows) == 1:
        return rows[0][0]
    total: Value = Fraction(0)
    for column, head in enumerate(rows[0]):
        rest = [row[:column] + row[column + 1 :] for row in rows[1:]]
        minor = _minor(rest, scope)
        term = head * minor if _exact(head, minor) else scope.real(head) * scope.real(minor)
        term = -term if column % 2 else term
        total = total + term if _exact(total, term) else scope.real(total) + scope.real(term)
    return total


_FUNCTIONS = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()},
}
_TRIGONOMETRIC = frozenset("sin cos tan cot sec csc cis".split())
_WITH_POLES = frozenset("tan cot sec csc coth csch".split())
_OPERATIONS: dict[str, Callable] = {
    "num": _num,
    "sym": _sym,
    "group": _group,
    "add": _add,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "root": _root,
    "fact": _fact,
    "binom": _binom,
    "abs": _abs,
    "norm": _abs,
    "floor": _rounded(math.floor),
    "ceil": _rounded(math.ceil),
    "mod": _mod,
    "deg": _deg,
    "Re": _part("Re"),
    "Im": _part("Im"),
    "call": _call,
    "app": _app,
    "det": _det,
}
