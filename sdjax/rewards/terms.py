"""The middle of the grammar: sums, products, powers, subscripts."""

from __future__ import annotations

from sdjax.rewards import vocabulary as v
from sdjax.rewards.cursor import Cursor
from sdjax.rewards.nodes import Node, Unreadable, contains, num, sym

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
        if len(terms) == 1 and terms[0].op != "neg":
            return terms[0]
        if any(is_remainder(term) for term in terms):
            raise Unreadable("a remainder of the last term or of the whole")
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
            return (
                not self.unit_fraction_ahead()
                and not token.text.startswith("end")
                and token.text not in ("over", "choose")
            )
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
                if node.op == "deg":
                    self.skip_temperature()
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
        if contains(base, "matrix") and self.transposed(braced):
            return Node("transpose", (base,))
        if braced and base.op == "num" and inner.text in v.ORDINALS and inner.kind == "word":
            if self.token_at(self.position + 2).text == "}":
                self.position += 3
                return base  # 5^{\text{th}}
        exponent = self.script()
        if base.op == "pow" and not braced:
            raise Unreadable("double superscript")
        if base.op == "sym" and base.args[0] in UNKNOWN_FUNCTIONS and is_minus_one(exponent):
            if self.is_op("("):
                return self.application(base.args[0] + "^-1")
        return Node("pow", (base, exponent))

    def skip_temperature(self) -> None:
        """Celsius and Fahrenheit behind the degree sign, bare or in braces."""
        braced = self.is_op("{") and self.token_at(self.position + 2).text == "}"
        if self.token_at(self.position + braced).text in ("C", "F"):
            self.position += 1 + 2 * braced

    def transposed(self, braced: bool) -> bool:
        """Whether the exponent is a T, alone or in braces, and then consumes it."""
        at = self.position + braced
        if self.token_at(at).text not in ("T", "top"):
            return False
        if braced and self.token_at(at + 1).text != "}":
            return False
        self.position = at + 1 + braced
        return True

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


def is_remainder(node: Node) -> bool:
    r"""Whether the node is `a \bmod b`, perhaps behind a sign."""
    return (node.args[0] if node.op == "neg" else node).op == "mod"


def is_minus_one(node: Node) -> bool:
    """Whether the node is -1, with or without braces."""
    node = ungroup(node)
    return node.op == "neg" and ungroup(node.args[0]) == num(1)
