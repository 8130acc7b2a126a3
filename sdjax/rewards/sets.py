"""Subsets of the real line in normal form: intervals, finite sets, unions, inequalities.

A `RealSet` is a sorted tuple of disjoint pieces with exact end points (nodes), so that two sets are
equal when their pieces are. Ends are ordered by value and compared exactly.
"""

from __future__ import annotations

from typing import NamedTuple

from sdjax.rewards.nodes import INFINITY, Node, Undefined, Unreadable, symbols
from sdjax.rewards.numeric import real_constant, same_value

NEGATIVE_INFINITY = Node("neg", (INFINITY,))
MAX_PIECES = 32


class End(NamedTuple):
    """An end of a piece: its node, its value (infinite ends too), whether it belongs."""

    node: Node
    value: object
    closed: bool


class Piece(NamedTuple):
    """One interval or, with equal closed ends, one point."""

    low: End
    high: End


RealSet = tuple[Piece, ...]


def strip_groups(node: Node) -> Node:
    """Without transparent braces and single parentheses."""
    while node.op == "group":
        node = node.args[0]
    return node


def strip(node: Node) -> Node:
    """Without transparent groups, and with a signed infinity in one form."""
    node = strip_groups(node)
    if node.op == "neg" and strip(node.args[0]) == INFINITY:
        return NEGATIVE_INFINITY
    if node.op == "quantity":
        return strip(node.args[0])
    return node


def end(node: Node, closed: bool) -> End:
    """An end point; infinity is never contained."""
    node = strip(node)
    if node == INFINITY or node == NEGATIVE_INFINITY:
        return End(node, float("inf") if node == INFINITY else float("-inf"), closed)
    value = real_constant(node)
    if value is None:
        raise Unreadable("variable or complex end point")
    return End(node, value, closed)


def real_line() -> RealSet:
    """All real numbers."""
    return (Piece(end(NEGATIVE_INFINITY, False), end(INFINITY, False)),)


def interval(low: Node, high: Node, low_closed: bool, high_closed: bool) -> RealSet:
    """An interval; raises Unreadable when it is empty or reversed (nobody writes that)."""
    a, b = end(low, low_closed), end(high, high_closed)
    if (a.closed and a.node == NEGATIVE_INFINITY) or (b.closed and b.node == INFINITY):
        raise Unreadable("closed infinite end")
    if not a.value < b.value and not (_same(a, b) and a.closed and b.closed):
        raise Unreadable("reversed interval")
    return (Piece(a, b),)


def to_set(node: Node) -> RealSet:
    """A set expression in normal form; raises Unreadable where it is none."""
    node = strip(node)
    if node.op == "seq" and len(node.args[2]) == 2:
        opening, closing, (low, high) = node.args
        return interval(low, high, opening == "[", closing == "]")
    if node.op == "set":
        return normal([Piece(end(item, True), end(item, True)) for item in node.args])
    if node.op == "named_set" and node.args[0] == "R":
        return real_line()
    if node.op == "union":
        return normal([*to_set(node.args[0]), *to_set(node.args[1])])
    if node.op == "inter":
        return intersection(to_set(node.args[0]), to_set(node.args[1]))
    if node.op == "minus":
        return difference(to_set(node.args[0]), to_set(node.args[1]))
    if node.op == "add" and len(node.args) == 2 and node.args[1].op == "neg":
        return difference(to_set(node.args[0]), to_set(node.args[1].args[0]))
    if node.op == "builder":
        return _built(*node.args)
    raise Unreadable(f"no set: {node.op}")


def _built(variable: str, either: bool, conditions: tuple[Node, ...]) -> RealSet:
    """The set of a set-builder whose conditions bound its one variable."""
    result = None
    for condition in conditions:
        if condition.op != "rel" or isolated(condition) != Node("sym", (variable,)):
            raise Unreadable("condition of a set")
        part = solution_set(condition)
        if result is None:
            result = part
        else:
            result = normal([*result, *part]) if either else intersection(result, part)
    if result is None:
        raise Unreadable("empty condition")
    return result


def _same(a: End, b: End) -> bool:
    if a.value in (float("inf"), float("-inf")) or b.value in (float("inf"), float("-inf")):
        return a.value == b.value
    return same_value(a.node, b.node) is True


def _less(a: End, b: End) -> bool:
    return not _same(a, b) and a.value < b.value


def normal(pieces: list[Piece]) -> RealSet:
    """Sorted, with overlapping and touching pieces joined."""
    if len(pieces) > MAX_PIECES:
        raise Unreadable("too many pieces")
    pieces = sorted(pieces, key=lambda p: (p.low.value, not p.low.closed))
    joined: list[Piece] = []
    for piece in pieces:
        if joined and _touch(joined[-1], piece):
            last = joined.pop()
            low = last.low
            if _same(last.low, piece.low) and piece.low.closed:
                low = piece.low
            joined.append(Piece(low, _higher(last.high, piece.high)))
        else:
            joined.append(piece)
    return tuple(joined)


def _touch(left: Piece, right: Piece) -> bool:
    if _same(left.high, right.low):
        return left.high.closed or right.low.closed
    return right.low.value < left.high.value


def _higher(a: End, b: End) -> End:
    if _same(a, b):
        return a if a.closed else b
    return b if a.value < b.value else a


def complement(real_set: RealSet) -> RealSet:
    """The rest of the real line."""
    low = end(NEGATIVE_INFINITY, False)
    pieces = []
    for piece in real_set:
        high = piece.low._replace(closed=not piece.low.closed)
        _append_gap(pieces, low, high)
        low = piece.high._replace(closed=not piece.high.closed)
    _append_gap(pieces, low, end(INFINITY, False))
    return tuple(pieces)


def _append_gap(pieces: list[Piece], low: End, high: End) -> None:
    infinite = low.value == float("inf") or high.value == float("-inf")
    if infinite:
        return
    if _less(low, high) or (_same(low, high) and low.closed and high.closed):
        pieces.append(Piece(low, high))


def intersection(left: RealSet, right: RealSet) -> RealSet:
    """By De Morgan."""
    return complement(normal([*complement(left), *complement(right)]))


def difference(left: RealSet, right: RealSet) -> RealSet:
    """left without right."""
    return intersection(left, complement(right))


def same_set(left: RealSet, right: RealSet) -> bool:
    """Whether two sets have the same pieces."""
    return len(left) == len(right) and all(
        _same(a.low, b.low)
        and _same(a.high, b.high)
        and (a.low.closed, a.high.closed) == (b.low.closed, b.high.closed)
        for a, b in zip(left, right, strict=True)
    )


def solution_set(node: Node) -> RealSet:
    """The set that an inequality (or a chain of them) in one isolated variable describes."""
    ops, members = node.args
    result = real_line()
    isolated(node)
    for op, left, right in zip(ops, members, members[1:], strict=False):
        result = intersection(result, _half_line(op, strip(left), strip(right)))
    return result


def isolated(node: Node) -> Node:
    """The one variable, or f(x), that an inequality bounds; raises Unreadable without one."""
    sides = {strip(member) for member in node.args[1] if symbols(member)}
    sides = {strip(side.args[0]) if side.op in ("neg", "abs") else side for side in sides}
    if len(sides) != 1 or next(iter(sides)).op not in ("sym", "app"):
        raise Unreadable("not one isolated variable")
    return next(iter(sides))


_MIRROR = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _half_line(op: str, left: Node, right: Node) -> RealSet:
    """x < c and its kin, for either order of the sides, also -x < c."""
    if op not in _MIRROR:
        raise Unreadable("no inequality")
    if symbols(right):
        left, right, op = right, left, _MIRROR[op]
    if symbols(right):
        raise Unreadable("variable on both sides")
    if left.op == "abs":
        return _absolute(op, right)
    if left.op == "neg":
        right, op = Node("neg", (right,)), _MIRROR[op]
    if op == "!=":
        return complement(to_set(Node("set", (right,))))
    if op in ("<", "<="):
        return interval(NEGATIVE_INFINITY, right, False, op == "<=")
    return interval(right, INFINITY, op == ">=", False)


def _conjunction(conditions: tuple[Node, ...]) -> RealSet:
    """`x > 1, x < 2`: what satisfies every inequality, all of them in one variable."""
    if len({isolated(condition) for condition in conditions if condition.op == "rel"}) != 1:
        raise Unreadable("not inequalities in one variable")
    result = real_line()
    for condition in conditions:
        if condition.op != "rel":
            raise Unreadable("no inequality")
        result = intersection(result, solution_set(condition))
    return result


def _absolute(op: str, bound: Node) -> RealSet:
    """|x| against a bound."""
    low, closed = Node("neg", (bound,)), op in ("<=", ">=")
    if op in ("<", "<="):
        return interval(low, bound, closed, closed)
    if op == "!=":
        return complement(to_set(Node("set", (low, bound))))
    return complement(interval(low, bound, not closed, not closed))


def try_set(node: Node) -> RealSet | None:
    """The set a node denotes (set expression or inequality), or None."""
    try:
        if node.op == "rel" and not {"=", "in", "equiv"} & set(node.args[0]):
            return solution_set(node)
        if node.op == "rel" and node.args[0] == ("in",):
            return to_set(node.args[1][1])
        if node.op == "list":
            return _conjunction(node.args)
        if node.op == "orlist":
            pieces = [piece for item in node.args for piece in solution_set(item)]
            return normal(pieces)
        return to_set(node)
    except (Unreadable, Undefined, ValueError):
        return None
