"""The bottom of the grammar: numbers, symbols, groups, fractions, roots, matrices, brackets."""

from __future__ import annotations

from fractions import Fraction

from sdjax.rewards.functions import Functions
from sdjax.rewards.nodes import (
    EMPTY_SET,
    INFINITY,
    Node,
    TooBig,
    UnknownNotation,
    Unreadable,
    num,
    sym,
)
from sdjax.rewards.terms import UNKNOWN_FUNCTIONS, refuse, ungroup
from sdjax.rewards.tokens import Token

FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac")
MATRICES = ("pmatrix", "bmatrix", "Bmatrix", "matrix", "array", "smallmatrix")
BINOMIALS = ("binom", "dbinom", "tbinom")
ACCENTS = {"bar": "bar", "overline": "bar", "vec": "", "hat": "hat", "widehat": "hat"}
ACCENTS |= {"tilde": "tilde", "overrightarrow": "", "overleftrightarrow": "line"}
FIGURES = {"angle": "∠", "measuredangle": "∠", "triangle": "△", "bigtriangleup": "△", "odot": "⊙"}


class Atoms(Functions):
    """One indivisible piece of an expression."""

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
        if self.unit_fraction_ahead():
            return None
        if self.is_cmd(*FRACTIONS):
            self.next()
            top, bottom = self.argument(), self.argument()
            if self.is_op("^", "_", "!"):
                self.position = start
                return None
            top, bottom = ungroup(top), ungroup(bottom)
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
        """A letter, or a function's name with its primes and arguments: x, f'(x)."""
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
        raise UnknownNotation(f"command {name!r}")

    def figure_letters(self) -> str:
        """Letters of a named object: a group of them, or all that follow without a gap."""
        if self.is_op("{"):
            return self.label()
        letters = ""
        while self.peek().kind == "sym" and (not letters or not self.peek().gap):
            letters += self.next().text
        return letters or refuse("name of a figure")

    def root(self) -> Node:
        """A root after its command: [index] and the radicand; the index is 2 when absent."""
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
        if name not in (*MATRICES, "vmatrix"):
            raise UnknownNotation(f"environment {name!r}")
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
