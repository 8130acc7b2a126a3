"""Named functions: \\sin x, \\log_2 3, \\gcd(a, b), and how far their arguments reach."""

from __future__ import annotations

from sdjax.rewards import vocabulary as v
from sdjax.rewards.nodes import Node, Unreadable, num
from sdjax.rewards.terms import Terms, is_minus_one

INVERSE = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}


class Functions(Terms):
    """Rules for functions and their arguments."""

    def function(self) -> Node:
        r"""\sin x, \log_2 3, \gcd(a, b), with powers before the argument."""
        name = self.next().text
        if name in v.LIST_FUNCTIONS or name in ("gcd", "lcm"):
            return self.list_function(name)
        base = None
        power = None
        while self.is_op("^", "_"):
            if self.next().text == "^":
                power = self.script()
            else:
                base = self.script()
        if name == "log":
            base = base or num(10)
        name = INVERSE.get(name, name)
        if name == "log" and base is None:
            base = num(10)
        if power is not None and is_minus_one(power):
            name, power = "arc" + name, None
        argument = self.function_argument()
        node = Node("call", (name, argument) if base is None else (name, argument, base))
        return node if power is None else Node("pow", (node, power))

    def function_argument(self) -> Node:
        """A bracketed argument, else the juxtaposed factors up to an operator or function."""
        if self.is_op("(", "["):
            return self.bracketed()
        negative = self.is_op("-") and bool(self.next())
        node = self.function() if self.peek().kind == "func" else self.factor()
        while self.starts_factor() and self.peek().kind != "func" and not self.is_op("(", "["):
            node = Node("mul", (node, self.factor()))
        divisor = self.token_at(self.position + 1)
        if self.is_op("/") and divisor.kind == "num" and _is_constant(node):
            self.next()
            node = Node("div", (node, self.factor()))
        return Node("neg", (node,)) if negative else node

    def list_function(self, name: str) -> Node:
        """A function of a list, as max or gcd: its items in braces or parentheses."""
        if self.is_op("\\{"):
            items = list(self.braced_set().args)
        elif self.is_op("("):
            self.next()
            items, _ = self.items(end=(")",))
            self.expect(")")
        else:
            raise Unreadable(f"arguments of {name}")
        return Node("call", (name, *items))


def _is_constant(node: Node) -> bool:
    if node.op == "sym":
        return node.args[0] == "pi"
    return all(_is_constant(a) for a in node.args if isinstance(a, Node))
