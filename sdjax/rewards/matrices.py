"""Matrix expressions written out: scalar multiples, sums, products, powers, transposes."""

from __future__ import annotations

from sdjax.rewards.nodes import Node, num
from sdjax.rewards.sets import strip, strip_groups

MAX_FACTORS = 6  # the entries' size grows exponentially with the matrices multiplied


def is_matrix(node: Node) -> bool:
    """Whether a matrix takes part in the expression."""
    node = strip_groups(node)
    if node.op in ("add", "neg", "mul", "div", "transpose", "pow"):
        return any(is_matrix(arg) for arg in node.args if isinstance(arg, Node))
    return node.op == "matrix"


def matrix_rows(node: Node) -> list[list[Node]] | None:
    """Entries of a matrix expression: scalar multiples, sums, products, transposes."""
    if _factors(node) > MAX_FACTORS:
        return None
    node = strip_groups(node)
    if node.op == "matrix":
        return [list(row) for row in node.args]
    if node.op == "seq" and node.args[:2] == ("(", ")"):
        return [[item] for item in node.args[2]]
    if node.op == "transpose":
        rows = matrix_rows(node.args[0])
        return rows and [list(column) for column in zip(*rows, strict=True)]
    if node.op == "neg":
        return _map(matrix_rows(node.args[0]), lambda x: Node("neg", (x,)))
    if node.op == "div" and not is_matrix(node.args[1]):
        return _map(matrix_rows(node.args[0]), lambda x: Node("div", (x, node.args[1])))
    if node.op == "mul":
        return _scaled(*node.args)
    if node.op == "pow" and strip(node.args[1]) in (num(2), num(3)):
        rows = matrix_rows(node.args[0])
        square = _product(rows, rows)
        return square if strip(node.args[1]) == num(2) else _product(square, rows)
    if node.op == "add":
        return _summed([matrix_rows(arg) for arg in node.args])
    return None


def _factors(node: Node) -> int:
    """How many matrices are multiplied at most in one term."""
    node = strip_groups(node)
    if node.op == "matrix":
        return 1
    parts = [_factors(arg) for arg in node.args if isinstance(arg, Node)]
    if node.op == "mul":
        return sum(parts)
    if node.op == "pow" and parts[0]:
        return 3 * parts[0]
    return max(parts, default=0)


def _map(rows, function):
    return rows and [[function(item) for item in row] for row in rows]


def _scaled(left: Node, right: Node):
    if is_matrix(left) and is_matrix(right):
        return _product(matrix_rows(left), matrix_rows(right))
    factor, matrix = (right, left) if is_matrix(left) else (left, right)
    return _map(matrix_rows(matrix), lambda x: Node("mul", (factor, x)))


def _product(left, right):
    if left is None or right is None or len(left[0]) != len(right) or len(right) > 6:
        return None
    columns = list(zip(*right, strict=True))
    return [
        [
            Node("add", tuple(Node("mul", pair) for pair in zip(row, column, strict=True)))
            for column in columns
        ]
        for row in left
    ]


def _summed(parts):
    if any(part is None for part in parts):
        return None
    if len({(len(part), len(part[0])) for part in parts}) != 1:
        return None
    return [
        [Node("add", tuple(part[i][j] for part in parts)) for j in range(len(parts[0][0]))]
        for i in range(len(parts[0]))
    ]
