"""The lower half of the grammar: sums, products, powers, functions, atoms."""

from __future__ import annotations

from fractions import Fraction

from sdjax.rewards import vocabulary as v
from sdjax.rewards.nodes import EMPTY_SET, INFINITY, Node, TooBig, Unreadable, num, sym
from sdjax.rewards.tokens import Token

MAX_DEPTH = 50
END = Token("end", "")
FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac")
BINOMIALS = ("binom", "dbinom", "tbinom")
UNKNOWN_FUNCTIONS = frozenset("f g h F G H P Q T".split())
ACCENTS = {"bar": "bar", "overline": "bar", "vec": "", "hat": "hat", "widehat": "hat"}
ACCENTS |= {"tilde": "tilde", "overrightarrow": "", "overleftrightarrow": "line"}
FIGURES = {"angle": "∠", "measuredangle": "∠", "triangle": "△", "bigtriangleup": "△", "odot": "⊙"}
INVERSE = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
HYPERBOLIC_INVERSE = ("sinh", "cosh", "tanh")


class Atoms:
    """A cursor over tokens with the rules from `additive` down."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    # -- cursor

    def token_at(self, position: int) -> Token:
        return self.tokens[position] if position < len(self.tokens) else END

    def peek(self) -> Token:
        return self.token_at(self.position)

    def next(self) -> Token:
        token = self.peek()
        self.position += 1
        return token

    def at_end(self) -> bool:
        return self.position >= len(self.tokens)

    def is_op(self, *texts: str) -> bool:
        token = self.peek()
        return token.kind == "op" and token.text in texts

    def is_word(self, *texts: str) -> bool:
        token = self.peek()
        return token.kind == "word" and token.text.lower() in texts

    def is_cmd(self, *texts: str) -> bool:
        token = self.peek()
        return token.kind == "cmd" and token.text in texts

    def expect(self, text: str) -> None:
        if not self.is_op(text):
            raise Unreadable(f"expected {text!r} before {self.peek().text!r}")
        self.next()

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig("nested too deeply")

    def leave(self) -> None:
        self.depth -= 1

    # -- sums and products

    def additive(self) -> Node:
        """Sum of signed products; plus-minus stays symbolic."""
        self.enter()
        terms = [self.signed_product(first=True)]
        while self.is_op("+", "-", "pm", "mp"):
            terms.append(self.signed_product())
        self.leave()
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed_product(self, first: bool = False) -> Node:
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
        self.next()
        if self.is_op("circ", "deg"):
            self.next()
            return Node("deg", (base,))
        if self.is_op("'"):
            self.next()
            return sym(base.args[0] + "'") if base.op == "sym" else _refuse("prime")
        braced = self.is_op("{")
        inner = self.token_at(self.position + 1)
        if braced and inner.text in ("circ", "deg", "'") and inner.kind == "op":
            self.next()
            self.next()
            self.expect("}")
            if inner.text == "'":
                return sym(base.args[0] + "'") if base.op == "sym" else _refuse("prime")
            return Node("deg", (base,))
        if braced and inner.text == "T" and self.token_at(self.position + 2).text == "}":
            if base.op in ("matrix", "group"):
                self.position += 3
                return Node("transpose", (base,))
        exponent = self.script()
        if base.op == "pow" and not braced:
            raise Unreadable("double superscript")
        if base.op == "sym" and base.args[0] in UNKNOWN_FUNCTIONS and _is_minus_one(exponent):
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

    # -- atoms

    def atom(self) -> Node:
        """One indivisible piece."""
        self.enter()
        token = self.peek()
        if token.kind == "num":
            node = self.number()
        elif token.kind == "sym":
            node = self.symbol()
        elif token.kind == "func":
            node = self.function()
        elif token.kind == "cmd":
            node = self.command()
        elif token.kind == "set":
            node = Node("named_set", (self.next().text,))
        elif token.kind == "op":
            node = self.delimited()
        else:
            raise Unreadable(f"unexpected {token.text or 'end'!r}")
        self.leave()
        return node

    def number(self) -> Node:
        """A literal; an integer followed by a proper fraction of integers is a mixed number."""
        token = self.next()
        whole = num(token.value)
        if token.text.isdecimal() and not self.is_op("^", "_", "!"):
            part = self.proper_fraction()
            if part is not None:
                return Node("group", (num(token.value + part),))
        return whole

    def proper_fraction(self) -> Fraction | None:
        r"""Value of a literal \frac{a}{b} with 0 < a < b here, or of ` a/b`; else None."""
        start = self.position
        if self.is_cmd(*FRACTIONS):
            self.next()
            top, bottom = self.argument(), self.argument()
            if self.is_op("^", "_", "!"):
                self.position = start
                return None
            top, bottom = _ungroup(top), _ungroup(bottom)
            if top.op == bottom.op == "num" and 0 < top.args[0] < bottom.args[0]:
                if top.args[0].denominator == bottom.args[0].denominator == 1:
                    return top.args[0] / bottom.args[0]
            if top.op == bottom.op == "num":
                raise Unreadable("integer before an improper fraction")
            self.position = start
            return None
        a, slash, b = (self.token_at(start + k) for k in range(3))
        if a.kind == b.kind == "num" and slash.text == "/" and a.gap and a.text.isdecimal():
            if b.text.isdecimal() and 0 < a.value < b.value:
                self.position += 3
                return a.value / b.value
        return None

    def symbol(self) -> Node:
        token = self.next()
        name = token.text
        if name in UNKNOWN_FUNCTIONS:
            primes = ""
            while self.is_op("'"):
                self.next()
                primes += "'"
            if self.is_op("(") and not (name.isupper() and self.peek().gap):
                return self.application(name + primes)
            return sym(name + primes)
        return sym(name)

    def application(self, name: str) -> Node:
        """f(...): an unknown function of its arguments."""
        self.next()
        items, _ = self.items(end=(")",))
        self.expect(")")
        if not items:
            raise Unreadable("function without an argument")
        return Node("app", (name, *items))

    def group(self) -> Node:
        """{ ... }: transparent braces; a list inside them is a list."""
        self.next()
        if self.is_op("}"):
            raise Unreadable("empty group")
        items, hedged = self.items(end=("}",))
        self.infix_group(items)
        self.expect("}")
        if len(items) == 1:
            return Node("group", (items[0],))
        return Node("orlist" if hedged else "set", tuple(items))

    def infix_group(self, items: list[Node]) -> None:
        r"""{n \choose k} and {a \over b}."""
        if self.is_cmd("choose", "over") and len(items) == 1:
            op = "binom" if self.next().text == "choose" else "div"
            items[0] = Node(op, (items[0], self.additive()))

    def argument(self) -> Node:
        r"""Argument of \frac and the like: a group, or one token (of a number one digit)."""
        if self.is_op("{"):
            return self.group()
        token = self.peek()
        if token.kind == "num" and token.text.isdecimal() and len(token.text) > 1:
            rest = token.text[1:]
            self.tokens[self.position : self.position + 1] = [
                Token("num", token.text[0], token.gap, Fraction(token.text[0])),
                Token("num", rest, "", Fraction(rest)),
            ]
        return self.atom()

    def command(self) -> Node:
        r"""\frac, \sqrt, \binom, matrices, accents, infinity."""
        name = self.next().text
        if name in FRACTIONS:
            return Node("group", (Node("div", (self.argument(), self.argument())),))
        if name in BINOMIALS:
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name == "infty":
            return INFINITY
        if name in ("emptyset", "varnothing"):
            return EMPTY_SET
        if name in ACCENTS:
            return sym(f"{ACCENTS[name]}{self.figure_letters()}")
        if name in FIGURES:
            return sym(FIGURES[name] + self.figure_letters())
        if name in ("mathcal", "mathfrak"):
            return sym(f"{name} {self.figure_letters()}")
        if name in ("Re", "Im"):
            return Node(name, (self.argument(),))
        if name.startswith("begin "):
            return self.matrix(name.removeprefix("begin "))
        raise Unreadable(f"command {name!r}")

    def figure_letters(self) -> str:
        """Letters of a named object: a group of them, or all that follow without a gap."""
        if self.is_op("{"):
            return self.label()
        letters = ""
        while self.peek().kind == "sym" and (not letters or not self.peek().gap):
            letters += self.next().text
        return letters or _refuse("name of a figure")

    def root(self) -> Node:
        index = None
        if self.is_op("["):
            self.next()
            index = self.additive()
            self.expect("]")
        if self.is_op("("):
            radicand = self.bracketed()
        else:
            radicand = self.group() if self.is_op("{") else self.atom()
        return Node("root", (radicand, index or num(2)))

    def matrix(self, name: str) -> Node:
        """Rows of an environment; bars make a determinant."""
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "vmatrix"):
            raise Unreadable(f"environment {name!r}")
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while not self.is_cmd(f"end {name}"):
            row.append(self.element())
            if self.is_op("&"):
                self.next()
            elif self.is_op("\\\\"):
                self.next()
                rows.append(tuple(row))
                row = []
            elif not self.is_cmd(f"end {name}"):
                raise Unreadable("matrix row")
            if len(rows) > 16 or len(row) > 16:
                raise TooBig("matrix")
        self.next()
        if row:
            rows.append(tuple(row))
        if not rows or len({len(r) for r in rows}) != 1:
            raise Unreadable("ragged matrix")
        return Node("det" if name == "vmatrix" else "matrix", tuple(rows))

    def delimited(self) -> Node:
        """Brackets, braces, bars, floors."""
        if self.is_op("(", "["):
            return self.bracketed()
        if self.is_op("{"):
            return self.group()
        if self.is_op("\\{"):
            return self.braced_set()
        if self.is_op("langle"):
            return self.angled()
        for opening, closing, op in (
            ("|", "|", "abs"),
            ("lv", "rv", "abs"),
            ("norm", "norm", "norm"),
            ("lfloor", "rfloor", "floor"),
            ("lceil", "rceil", "ceil"),
        ):
            if self.is_op(opening):
                self.next()
                self.bars_open += op == "abs"
                inner = self.additive()
                self.bars_open -= op == "abs"
                self.expect(closing)
                return Node(op, (inner,))
        raise Unreadable(f"unexpected {self.peek().text!r}")

    # -- functions

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
        if power is not None and _is_minus_one(power):
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
        if self.is_op("\\{"):
            items = list(self.braced_set().args)
        elif self.is_op("("):
            self.next()
            items, _ = self.items(end=(")",))
            self.expect(")")
        else:
            raise Unreadable(f"arguments of {name}")
        return Node("call", (name, *items))


def _refuse(what: str):
    raise Unreadable(what)


def _ungroup(node: Node) -> Node:
    while node.op == "group":
        node = node.args[0]
    return node


def _is_minus_one(node: Node) -> bool:
    node = _ungroup(node)
    return node.op == "neg" and _ungroup(node.args[0]) == num(1)


def _is_constant(node: Node) -> bool:
    if node.op == "sym":
        return node.args[0] == "pi"
    return all(_is_constant(a) for a in node.args if isinstance(a, Node))
