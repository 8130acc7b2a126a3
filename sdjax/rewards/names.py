"""What may name a value: x, f(x), \\angle ABC, AB : CD; and when two names mean the same.

`sdjax.rewards.equality` asks this of the sides of equations, so that `name = value` equals `value`.
"""

from __future__ import annotations

from sdjax.rewards.nodes import Node, children, contains, sym, symbols
from sdjax.rewards.sets import strip, strip_groups


def is_name(node: Node) -> bool:
    """x, f(x), \\angle ABC, (a, b), words: something that an equation gives a value to."""
    node = strip_groups(node)
    if node.op in ("app", "name"):
        return True
    if node.op == "sym":
        return node.args[0] not in ("pi", "e", "i")
    if node.op == "seq":
        return all(is_name(item) for item in node.args[2])
    if node.op == "abs" and strip_groups(node.args[0]).op == "sym":
        return not is_distance(node)  # |z|
    return _is_figure(node) or _is_applied(node)


def _is_applied(node: Node) -> bool:
    """p(x): a symbol before a bracketed symbol or number, read as a product."""
    if node.op != "mul":
        return False
    head, inner = node.args
    return head.op == "sym" and inner.op == "group" and strip(inner).op in ("sym", "num")


def _is_figure(node: Node) -> bool:
    """AB, |AB|, AB/CD, AB : CD: measures that geometry writes with capitals."""
    node = strip_groups(node)
    if node.op == "sym":
        return node.args[0][:1].isupper() or not node.args[0][:1].isascii()
    if node.op in ("mul", "div", "ratio", "abs"):
        return all(_is_figure(arg) for arg in node.args)
    return False


def may_name(node: Node) -> bool:
    """What may stand for a plain value in an answer: a name, m + n, |z|, P(x), dy/dx."""
    return bool(is_name(node) or symbols(node) or contains(node, "app", "name"))


def is_symbol(node: Node) -> bool:
    """A name that is not words."""
    return is_name(node) and node.op != "name"


def same_name(left: Node, right: Node) -> bool:
    """One name, or x beside x_1, a root among several, or AB beside |AB|."""
    left, right = _measure(left), _measure(right)
    if left == right:
        return True
    if left.op != "sym" or right.op != "sym":
        return False
    (stem, _, index), (other, _, number) = (s.args[0].partition("_") for s in (left, right))
    return stem == other and not (index and number) and (index or number).isdecimal()


def _measure(node: Node) -> Node:
    """AB for |AB|: both are the length of a segment."""
    inner = strip_groups(node.args[0]) if node.op == "abs" else node
    return inner if inner.op == "mul" and _is_figure(inner) else node


def is_graph(name: Node, function: Node) -> bool:
    """y and f(x): two names for the value of a function of x."""
    if name != sym("y") or function.op != "app" or len(function.args) != 2:
        return False
    return strip_groups(function.args[1]) == sym("x")


def is_capital(node: Node) -> bool:
    """A, P: what a point may be called."""
    return node.op == "sym" and len(node.args[0]) == 1 and node.args[0].isupper()


def is_distance(name: Node) -> bool:
    """|x|: an equation for x, which has two solutions."""
    return name.op == "abs" and strip_groups(name.args[0]) in (sym("x"), sym("y"))


def vanishing_equation(name: Node, value: Node) -> bool:
    """`x^2 - 25 = 0` names nothing: a left side with a constant term is an equation."""
    zero = Node("num", (value.args[0] * 0,)) if value.op == "num" else None
    if zero != value:
        return False
    return strip_groups(name).op == "add"


def bounded_names(node: Node) -> frozenset[str]:
    """Variables of inequalities; the one inside a set-builder is nobody else's."""
    if node.op == "builder":
        return frozenset()
    below = (bounded_names(child) for child in children(node))
    return frozenset().union(symbols(node) if node.op == "sym" else (), *below)


def assigned_names(node: Node) -> frozenset[str]:
    """a and b of the list `a = 2, b = 3`; none where an item is no such equation."""
    if node.op != "list" or any(item.op != "rel" or item.args[0] != ("=",) for item in node.args):
        return frozenset()
    names = [strip_groups(item.args[1][0]) for item in node.args]
    if any(name.op != "sym" for name in names):
        return frozenset()
    return frozenset(name.args[0].partition("_")[0] for name in names)  # x_1, x_2 are roots


def unpacked(node: Node) -> Node:
    """`(a, b) = (2, 3)` as the list of its equations."""
    sides = [strip_groups(side) for side in node.args[1]]
    if node.args[0] != ("=",) or any(side.op != "seq" for side in sides):
        return node
    names, values = (side.args[2] for side in sides)
    if len(names) != len(values) or not is_name(sides[0]):
        return node
    return Node(
        "list", tuple(Node("rel", (("=",), pair)) for pair in zip(names, values, strict=True))
    )
