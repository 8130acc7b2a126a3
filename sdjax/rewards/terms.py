"""The middle of the grammar: sums, products, powers, subscripts."""

from __future__ import annotations

from sdjax.rewards import vocabulary as v
from sdjax.rewards.cursor import Cursor
from sdjax.rewards.nodes import Node, Unreadable, num, sym

UNKNOWN_FUNCTIONS = frozenset("f g h F G H P Q T".split())


class Terms(Cursor):
    """Rules from `additive` to `subscripted`; `Atoms` adds what they are made of."""

    def additive(self) -> Node:
        """Sum of signed products; plus-minus stays symbolic."""
        self.enter()
        terms = [self.signed_product()]
        while self.is_op("+", "-", "pm", "mp"):
            terms.append(self.signed_product())
        self.leave()
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed_product(self) -> Node:
        """A product behind up to six signs: --x, +-x, pm x."""
        signs = []
        while self.is_op("+", "-", "pm", "mp"):
            signs.append(self.next().text)
            if len(signs) > 6:
                raise Unreadable("too many signs")
        term = self.product()
        for sign in reversed(signs):
            if sign != "+":
                term = Node({"-": "neg", "pm": "pm", "mp": "mp"}[sign], (term,))
        return term

    def product(self) -> Node:
        """Products and quotients from left to right; juxtaposition is a product."""
        left = self.factor()
        while True:
            if self.is_op("*"):
                self.next()
                left = Node("mul", (left, self.signed_factor()))
            elif self.is_op("/"):
                self.next()
                left = Node("div", (left, self.signed_factor()))
            elif self.is_op("bmod"):
                self.next()
                left = Node("mod", (left, self.signed_factor()))
            elif self.starts_factor() or (left.op == "fact" and self.peek().kind == "num"):
                left = Node("mul", (left, self.factor()))
            else:
                return left

    def signed_factor(self) -> Node:
        """A factor behind at most one sign, as after * and /."""
        if self.is_op("-"):
            self.next()
            return Node("neg", (self.factor(),))
        if self.is_op("+"):
            self.next()
        return self.factor()

    def starts_factor(self) -> bool:
        """Whether the next token multiplies what stands before it (a number never does)."""
        token = self.peek()
        if token.kind in ("sym", "func", "set"):
            return True
        if token.kind == "cmd":
            return not token.text.startswith("end") and token.text not in ("over", "choose")
        openings = ("(", "{", "\\{", "[", "lv", "lfloor", "lceil", "langle")
        if token.kind == "op" and token.text == "|":
            return self.bars_open == 0
        return token.kind == "op" and token.text in openings

    bars_open = 0  # inside |...| the next bar closes

    def factor(self) -> Node:
        """An atom with powers, factorials, primes and subscripts."""
        node = self.atom()
        while True:
            if self.is_op("^"):
                node = self.powered(node)
                if node.op == "deg" and self.peek().text in ("C", "F"):
                    self.next()  # Celsius, Fahrenheit
            elif self.is_op("!"):
                self.next()
                if self.is_op("!"):
                    raise Unreadable("double factorial")
                node = Node("fact", (node,))
            elif self.is_op("deg"):
                self.next()
                node = Node("deg", (node,))
            elif self.is_op("'") and node.op == "sym":
                self.next()
                node = sym(node.args[0] + "'")
            elif self.is_op("_"):
                node = self.subscripted(node)
            else:
                return node

    def powered(self, base: Node) -> Node:
        """What stands after ^: degrees, primes, or an exponent."""
        self.next()
        if self.is_op("circ", "deg"):
            self.next()
            return Node("deg", (base,))
        if self.is_op("'"):
            self.next()
            return sym(base.args[0] + "'") if base.op == "sym" else refuse("prime")
        braced = self.is_op("{")
        inner = self.token_at(self.position + 1)
        if braced and inner.text in ("circ", "deg", "'") and inner.kind == "op":
            self.next()
            self.next()
            self.expect("}")
            if inner.text == "'":
                return sym(base.args[0] + "'") if base.op == "sym" else refuse("prime")
            return Node("deg", (base,))
        if braced and inner.text == "T" and self.token_at(self.position + 2).text == "}":
            if base.op in ("matrix", "group"):
                self.position += 3
                return Node("transpose", (base,))
        exponent = self.script()
        if base.op == "pow" and not braced:
            raise Unreadable("double superscript")
        if base.op == "sym" and base.args[0] in UNKNOWN_FUNCTIONS and is_minus_one(exponent):
            if self.is_op("("):
                return self.application(base.args[0] + "^-1")
        return Node("pow", (base, exponent))

    def script(self) -> Node:
        """Argument of ^ or _: a group, or one factor with its sign and own powers."""
        if self.is_op("{"):
            return self.group()
        if self.is_op("-"):
            self.next()
            return Node("neg", (self.script(),))
        if self.is_op("("):
            return self.bracketed()
        self.enter()
        node = self.atom()
        if self.is_op("^"):
            node = self.powered(node)
        self.leave()
        return node

    def subscripted(self, node: Node) -> Node:
        """A subscript names a symbol, or gives the base of a literal integer."""
        self.next()
        label = self.label()
        if node.op == "num" and node.args[0].denominator == 1:
            base = v.NUMBER_WORDS.get(label.lower(), int(label) if label.isdecimal() else None)
            if base is None or not 2 <= base <= 36:
                raise Unreadable("base of a number")
            return Node("based", (str(node.args[0].numerator), base))
        if node.op != "sym":
            raise Unreadable("subscript of an expression")
        return sym(f"{node.args[0]}_{label}")

    def label(self) -> str:
        """Text of a subscript."""
        if not self.is_op("{"):
            return self.next().text
        self.next()
        parts = []
        depth = 1
        while not self.at_end():
            token = self.next()
            depth += (token.text == "{") - (token.text == "}")
            if depth == 0:
                return "".join(parts)
            if token.text not in ("{", "}"):
                parts.append(token.text)
        raise Unreadable("unclosed subscript")


def refuse(what: str):
    """Raises Unreadable, where an expression is needed."""
    raise Unreadable(what)


def ungroup(node: Node) -> Node:
    """The node inside its braces."""
    while node.op == "group":
        node = node.args[0]
    return node


def is_minus_one(node: Node) -> bool:
    """Whether the node is -1, with or without braces."""
    node = ungroup(node)
    return node.op == "neg" and ungroup(node.args[0]) == num(1)
