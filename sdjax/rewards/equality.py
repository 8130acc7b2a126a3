"""Equality of two answers by kind: values, names and relations, lists and sets, tuples, matrices.

`same_answer(gold, answer)` is True, False, or None where it could not be decided. The rules are
those of docs/verifier.md; the gold may be laxer than the answer in one way only: a gold inequality
accepts the interval, and a gold `name = value` the bare value.
"""

from __future__ import annotations

from sdjax.rewards import vocabulary as v
from sdjax.rewards.matrices import is_matrix, matrix_rows
from sdjax.rewards.names import (
    assigned_names,
    bounded_names,
    is_capital,
    is_distance,
    is_graph,
    is_name,
    is_symbol,
    may_name,
    same_name,
    unpacked,
    vanishing_equation,
)
from sdjax.rewards.nodes import (
    INFINITY,
    Node,
    TooBig,
    Undefined,
    Unreadable,
    num,
    symbols,
)
from sdjax.rewards.numeric import constant_ratio, proportional, same_value
from sdjax.rewards.plusminus import COLLECTIONS, spread
from sdjax.rewards.polynomials import same_zeros
from sdjax.rewards.sets import NEGATIVE_INFINITY, isolated, same_set, strip, strip_groups, try_set

SET_KINDS = ("union", "inter", "minus", "named_set", "builder")
INEQUALITIES = frozenset({"<", ">", "<=", ">=", "!="})


def same_answer(gold: Node, answer: Node) -> bool | None:
    """Whether two answers are equal as mathematics."""
    gold, answer = spread(gold), spread(answer)
    if gold.op == "union" and answer.op == "orlist":
        answer = _united(answer)
    if gold.op == "orlist" and not _inequalities(gold):
        gold = Node("list", gold.args)
    if answer.op == "orlist" and not _inequalities(answer):
        if gold.op not in ("list", "set") or len(assigned_names(gold)) > 1:
            return False  # a hedge; a = 2, b = 3 needs both
        answer = Node("list", answer.args)
    if answer.op == "rel" and assigned_names(gold):
        answer = unpacked(answer)
    return _same(gold, answer)


def _united(node: Node) -> Node:
    """`(0, 1) or (2, 3)` as the union of its intervals."""
    if any(strip_groups(item).op not in ("seq", "union", "set") for item in node.args):
        return node
    first, *rest = node.args
    for item in rest:
        first = Node("union", (first, item))
    return first


def _inequalities(node: Node) -> bool:
    return all(item.op == "rel" and set(item.args[0]) <= INEQUALITIES for item in node.args)


def _same(gold: Node, answer: Node) -> bool | None:
    """Dispatch on the kinds of two answers without plus-minus."""
    gold, gold_unit = _quantity(gold)
    answer, answer_unit = _quantity(answer)
    if _units_clash(gold_unit, answer_unit):
        return False
    if gold.op == "rel" or answer.op == "rel":
        return _same_relation(gold, answer)
    if gold.op in COLLECTIONS or answer.op in COLLECTIONS:
        return _same_collection(gold, answer)
    if gold.op in SET_KINDS or answer.op in SET_KINDS:
        return _same_real_set(gold, answer)
    if gold.op == "seq" or answer.op == "seq":
        return _same_sequence(gold, answer)
    if is_matrix(gold) or is_matrix(answer):
        return _same_matrix(gold, answer)
    if gold.op == "ratio" or answer.op == "ratio":
        return _same_ratio(gold, answer)
    for kind in ("based", "residue", "name"):
        if gold.op == kind or answer.op == kind:
            return gold.op == answer.op and _same_tagged(gold, answer)
    if INFINITY in (gold, answer) or NEGATIVE_INFINITY in (gold, answer):
        return gold == answer
    return _same_scalar(gold, answer)


def _same_scalar(gold: Node, answer: Node) -> bool | None:
    try:
        return same_value(gold, answer)
    except Undefined:
        return False


def _quantity(node: Node) -> tuple[Node, str]:
    """(value, unit) without groups; a leading plus or a degree sign does not matter."""
    unit = ""
    node = strip_groups(node)
    while node.op in ("quantity", "deg"):
        if node.op == "quantity":
            unit = node.args[1]
        else:
            unit = unit or "degrees"
        node = strip_groups(node.args[0])
    return strip(node), unit


def _units_clash(left: str, right: str) -> bool:
    """Two different known units: `5 cents` is not `5 dollars`."""
    a, b = (v.UNITS.get(_base_unit(unit)) for unit in (left, right))
    return a is not None and b is not None and a != b


def _base_unit(unit: str) -> str:
    """`square centimetres`, `cm^2` and `cm` by the unit that is squared."""
    words = [word for word in unit.lower().split() if word not in ("sq", "square", "cubic", "cu")]
    return "".join(words).partition("^")[0]


def _same_tagged(gold: Node, answer: Node) -> bool | None:
    if gold.op == "based":
        return (gold.args[0].lstrip("0"), gold.args[1]) == (
            answer.args[0].lstrip("0"),
            answer.args[1],
        )
    if gold.op == "residue":
        modulus = same_value(gold.args[1], answer.args[1])
        remainders = [Node("mod", (node.args[0], node.args[1])) for node in (gold, answer)]
        return modulus and same_value(*remainders)
    return gold.args[0].casefold() == answer.args[0].casefold()


def _same_ratio(gold: Node, answer: Node) -> bool | None:
    """Proportional terms; a ratio of two also equals the quotient."""
    if answer.op != "ratio" or gold.op != "ratio":
        ratio, other = (gold, answer) if gold.op == "ratio" else (answer, gold)
        if len(ratio.args) != 2:
            return False
        return _same(Node("div", ratio.args), other)
    if len(gold.args) != len(answer.args):
        return False
    if any(strip_groups(term) == num(0) for term in (*gold.args, *answer.args)):
        return _all(_same(a, b) for a, b in zip(gold.args, answer.args, strict=True))
    (first, *rest), (other, *others) = gold.args, answer.args
    pairs = zip(rest, others, strict=True)
    products = ((Node("mul", (first, b)), Node("mul", (other, a))) for a, b in pairs)
    return _all(_same_scalar(x, y) for x, y in products)


# -- relations


def _same_relation(gold: Node, answer: Node) -> bool | None:
    if gold.op == "rel" and answer.op == "rel":
        return _same_relations(gold, answer)
    if answer.op == "rel":
        return _relation_as_value(answer, gold)
    return _gold_relation_as_value(gold, answer)


def _same_relations(gold: Node, answer: Node) -> bool | None:
    kinds = set(gold.args[0]) | set(answer.args[0])
    if kinds == {"="}:
        return _same_equations(gold, answer)
    if kinds <= {"=", "in"}:
        return _same_members(gold, answer)
    if "=" in kinds or "in" in kinds or "equiv" in kinds:
        return _sets_equal(gold, answer)
    return _same_inequalities(gold, answer)


def _same_members(gold: Node, answer: Node) -> bool | None:
    """`x \\in A` against `x \\in B`, or `x = a` against `x \\in \\{a\\}`."""
    if len(gold.args[0]) != 1 or len(answer.args[0]) != 1:
        return False
    names = [strip_groups(node.args[1][0]) for node in (gold, answer)]
    return names[0] == names[1] and _same(gold.args[1][1], answer.args[1][1])


def _same_equations(gold: Node, answer: Node) -> bool | None:
    gold_sides, answer_sides = _sides(gold), _sides(answer)
    if gold_sides is None or answer_sides is None:
        return False
    (a, b), (c, d) = gold_sides, answer_sides
    if any(_structured(side) for side in (a, b, c, d)):
        return _same_side(a, c) and _same(b, d)
    if is_graph(a, c) or is_graph(c, a):
        return _same(b, d)
    if is_name(a) and same_name(a, c) and not symbols(b) and not symbols(d):
        return _same(b, d)
    return same_equation(a, b, c, d)


def same_equation(a: Node, b: Node, c: Node, d: Node) -> bool | None:
    """a = b against c = d: equal up to a non-zero constant factor."""
    left, right = (Node("add", (x, Node("neg", (y,)))) for x, y in ((a, b), (c, d)))
    try:
        if proportional(left, right):
            return True
        return same_zeros(left, right)  # xy = 6 and y = 6/x
    except (Unreadable, Undefined, TooBig):
        return False


def _sides(node: Node) -> tuple[Node, Node] | None:
    """(left, right) of a chain of equations whose later members agree; None if they do not."""
    members = [strip_groups(member) for member in node.args[1]]
    while len(members) > 2 and all(is_symbol(member) for member in members[:2]):
        members = members[1:]  # x = y = 5 says both
    values = members[1:]
    if any(_same(values[0], other) is not True for other in values[1:]):
        return None
    return members[0], values[-1]


def _same_side(left: Node, right: Node) -> bool | None:
    left, right = _quantity(left)[0], _quantity(right)[0]
    return left == right or _same(left, right)


def _structured(node: Node) -> bool:
    """A side that is no scalar: tuple, set, matrix, name of words."""
    kinds = (*COLLECTIONS, *SET_KINDS, "seq", "matrix", "based", "residue", "name", "inf")
    return _quantity(node)[0].op in kinds or is_matrix(node)


def _relation_as_value(answer: Node, gold: Node) -> bool | None:
    """`name = value` (or a chain that ends so) against a gold that is no relation."""
    ops, members = answer.args
    if ops == ("in",):
        if not is_name(members[0]) or strip(members[1]).op not in (*SET_KINDS, "set", "seq"):
            return False
        return _same(gold, members[1])
    if set(ops) <= INEQUALITIES:
        return _sets_equal(gold, answer)
    if set(ops) != {"="}:
        return False
    sides = _sides(answer)
    if sides is None:
        return False
    name, value = sides
    if is_name(value) and not may_name(name):
        name, value = value, name
    if is_name(name) or _same(name, value):
        return _same(gold, value)
    if symbols(gold) or not may_name(name) or _structured(name) or is_distance(name):
        return False
    return False if vanishing_equation(name, value) else _same(gold, value)


def _gold_relation_as_value(gold: Node, answer: Node) -> bool | None:
    """A gold `x = 5` accepts 5, a gold inequality or membership the interval."""
    ops, members = gold.args
    if ops == ("in",):
        return _same(members[1], answer)
    if set(ops) <= INEQUALITIES:
        return _sets_equal(gold, answer)
    if set(ops) != {"="}:
        return False
    sides = _sides(gold)
    if sides is None:
        return False
    if not symbols(gold) and not _structured(sides[0]) and _same(*sides):
        return _same(sides[1], answer)  # 2^{10} = 1024
    if not (is_name(sides[0]) or is_name(sides[1])):
        return False
    return _same(sides[1] if is_name(sides[0]) else sides[0], answer)


def _same_inequalities(gold: Node, answer: Node) -> bool | None:
    """Same solution set where one variable is isolated, else the same up to a factor."""
    a, b = try_set(gold), try_set(answer)
    if a is not None and b is not None:
        return isolated(gold) == isolated(answer) and same_set(a, b)
    return _same_chains(gold, answer)


def _same_chains(gold: Node, answer: Node) -> bool | None:
    """Chains link by link, after turning both into the < direction."""
    left, right = _ascending(gold), _ascending(answer)
    if left is None or right is None or len(left) != len(right):
        return False
    decided: bool | None = True
    for (op, a, b), (other, c, d) in zip(left, right, strict=True):
        differences = [Node("add", (y, Node("neg", (x,)))) for x, y in ((a, b), (c, d))]
        ratio = constant_ratio(*differences)
        if ratio is None:
            decided = None
        elif op != other or (ratio <= 0 if op != "!=" else ratio == 0):
            return False
    return decided


def _ascending(node: Node) -> list[tuple[str, Node, Node]] | None:
    """Links of a chain as (op, smaller, larger), or None for mixed directions."""
    ops, members = node.args
    links = []
    for op, a, b in zip(ops, members, members[1:], strict=False):
        a, b = strip_groups(a), strip_groups(b)
        if op in (">", ">="):
            links.append(({">": "<", ">=": "<="}[op], b, a))
        elif op in ("<", "<=", "!="):
            links.append((op, a, b))
        else:
            return None
    down = {op for op in ops if op in (">", ">=")}
    up = {op for op in ops if op in ("<", "<=")}
    if down and up:
        return None
    return links[::-1] if down else links


def _sets_equal(gold: Node, answer: Node) -> bool | None:
    a, b = try_set(gold), try_set(answer)
    if a is None or b is None:
        return False if a is not None or b is not None else None
    names = [bounded_names(node) for node in (gold, answer)]
    return (names[0] == names[1] or not all(names)) and same_set(a, b)


# -- collections, tuples, matrices


def _same_collection(gold: Node, answer: Node) -> bool | None:
    """Unordered lists and sets; a set may repeat members, a single value is its own list."""
    if gold.op in SET_KINDS or answer.op in SET_KINDS:
        return _same_real_set(gold, answer)
    if "orlist" in (gold.op, answer.op):
        return _sets_equal(gold, answer)
    if gold.op == "seq" and answer.op == "list":
        return _sets_equal(gold, answer) or _named_components(gold, answer)
    lists = []
    for node in (gold, answer):
        items = list(node.args) if node.op in COLLECTIONS else [node]
        lists.append(items)
    if len(lists[1]) > 8 + 3 * len(lists[0]):
        return False  # repeats aside, nobody lists that many
    if "set" in (gold.op, answer.op):
        lists = [_without_repeats(items) for items in lists]
    return _match(*lists)


def _named_components(gold: Node, answer: Node) -> bool | None:
    """`x = 1, y = -2` against the point (1, -2), in this order."""
    pairs = [item.args[1] for item in answer.args if item.op == "rel" and item.args[0] == ("=",)]
    names = [strip_groups(pair[0]) for pair in pairs if len(pair) == 2]
    if len(names) != len(answer.args) or any(name.op != "sym" for name in names):
        return False
    if len(set(names)) != len(names) or gold.args[:2] != ("(", ")"):
        return False
    return _same(gold, Node("seq", ("(", ")", tuple(pair[1] for pair in pairs))))


def _without_repeats(items: list[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(_same(other, item) for other in kept):
            kept.append(item)
    return kept


def _match(gold: list[Node], answer: list[Node]) -> bool | None:
    """Whether the answers can be paired off with the golds."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    undecided = False
    for item in gold:
        for index, other in enumerate(left):
            found = _same(item, other)
            if found:
                del left[index]
                break
            undecided |= found is None
        else:
            return None if undecided else False
    return True


def _same_real_set(gold: Node, answer: Node) -> bool | None:
    if gold == answer:
        return True
    if (gold.op == "named_set") != (answer.op == "named_set"):
        if ("R",) not in (gold.args[:1], answer.args[:1]):
            return False
    return _sets_equal(gold, answer)


def _same_sequence(gold: Node, answer: Node) -> bool | None:
    """Tuples and intervals: same brackets, same length, same members in order."""
    if gold.op == "seq" and answer.op == "seq":
        if gold.args[:2] != answer.args[:2] or len(gold.args[2]) != len(answer.args[2]):
            return False
        return _all(_same(a, b) for a, b in zip(gold.args[2], answer.args[2], strict=True))
    if is_matrix(gold) or is_matrix(answer):
        return _same_matrix(gold, answer)
    if gold.op == "seq" and answer.op == "app" and answer.args[0].isupper():
        return _same(gold, Node("seq", ("(", ")", answer.args[1:])))  # a point and its name
    if gold.op == "seq" and answer.op == "mul" and is_capital(answer.args[0]):
        return _same(gold, answer.args[1]) if answer.args[1].op == "seq" else False
    return False


def _all(verdicts) -> bool | None:
    decided: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        decided = None if verdict is None else decided
    return decided


def _same_matrix(gold: Node, answer: Node) -> bool | None:
    """Entry by entry after multiplying scalars in; a tuple stands for a column."""
    a, b = matrix_rows(gold), matrix_rows(answer)
    if a is None or b is None or len(a) != len(b) or len(a[0]) != len(b[0]):
        return False
    return _all(
        _same(x, y)
        for row, other in zip(a, b, strict=True)
        for x, y in zip(row, other, strict=True)
    )
