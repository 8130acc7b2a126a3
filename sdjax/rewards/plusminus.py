"""Plus-minus signs written out as lists of values."""

from __future__ import annotations

from collections.abc import Iterator

from sdjax.rewards.nodes import Node, Unreadable, children, contains

COLLECTIONS = ("list", "set", "orlist")
MAX_VARIANTS = 8
MAX_ITEMS = 64


def spread(node: Node) -> Node:
    """Write every plus-minus out: `1 \\pm x` becomes the list of its two values."""
    while node.op == "group":
        node = node.args[0]
    if node.op == "rel" and node.args[0] in (("in",), ("=",)) and node.args[1][1].op == "set":
        element, members = node.args[1]
        return Node("rel", (node.args[0], (element, spread(members))))
    if node.op in COLLECTIONS:
        items = [variant for item in node.args for variant in _variants(item)]
        if len(items) > MAX_ITEMS:
            raise Unreadable("too many values")
        return Node(node.op, tuple(items))
    variants = list(_variants(node))
    return variants[0] if len(variants) == 1 else Node("list", tuple(variants))


def _variants(node: Node) -> Iterator[Node]:
    """The values of an element with plus-minus signs, which move together where a \\mp occurs."""
    if not contains(node, "pm", "mp"):
        yield node
        return
    count = _count_signs(node)
    if contains(node, "mp"):
        count = 1
    if 2**count > MAX_VARIANTS:
        raise Unreadable("too many plus-minus signs")
    for mask in range(2**count):
        yield _choose(node, [bool(mask >> k & 1) for k in range(count)])


def _count_signs(node: Node) -> int:
    own = node.op in ("pm", "mp")
    return own + sum(_count_signs(child) for child in children(node))


def _choose(node: Node, minus: list[bool]) -> Node:
    """The node with its signs taken from `minus`, used up in reading order (one: for all)."""
    signs = iter(minus) if len(minus) > 1 else None

    def rebuild(current):
        if isinstance(current, Node):
            if current.op in ("pm", "mp"):
                negative = next(signs) if signs else minus[0] != (current.op == "mp")
                inner = rebuild(current.args[0])
                return Node("neg", (inner,)) if negative else inner
            return Node(current.op, tuple(rebuild(arg) for arg in current.args))
        if isinstance(current, tuple):
            return tuple(rebuild(item) for item in current)
        return current

    return rebuild(node)
