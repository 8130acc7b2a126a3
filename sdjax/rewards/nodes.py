"""The expression tree that our reader builds: plain immutable nodes, nothing evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple


class Node(NamedTuple):
    """One operation on its arguments (nodes, or strings and fractions at the leaves)."""

    op: str
    args: tuple[Any, ...] = ()


class Unreadable(ValueError):
    """The text is not in the language of our reader."""


class UnknownNotation(Unreadable):
    """A LaTeX command or environment that our reader does not have: math-verify may know it."""


class TooBig(ValueError):
    """A bound on size, depth, exponent or precision would be exceeded."""


class Undefined(ValueError):
    """The expression has no value: division by zero, a logarithm of zero."""


def num(value: int | Fraction) -> Node:
    """An exact rational number."""
    return Node("num", (Fraction(value),))


def sym(name: str) -> Node:
    """A free variable, or the constants e, i and pi."""
    return Node("sym", (name,))


CONSTANTS = frozenset({"pi", "e", "i"})
EMPTY_SET = Node("set", ())
REALS = Node("named_set", ("R",))
INFINITY = Node("inf")


def children(node: Node) -> Iterator[Node]:
    """Direct sub-nodes, also those inside the rows of a matrix."""
    for arg in node.args:
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, tuple):
            yield from (item for item in arg if isinstance(item, Node))


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(children(current))


def symbols(node: Node) -> frozenset[str]:
    """Names of the free variables; e, i and pi are constants."""
    found = {n.args[0] for n in walk(node) if n.op == "sym"}
    return frozenset(found) - CONSTANTS


def contains(node: Node, *ops: str) -> bool:
    """Whether any node below has one of these operations."""
    return any(n.op in ops for n in walk(node))


def mentions(node: Node, name: str) -> bool:
    """Whether a symbol of this name occurs."""
    return any(n.op == "sym" and n.args[0] == name for n in walk(node))
