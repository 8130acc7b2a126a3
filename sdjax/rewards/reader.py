r"""Recursive-descent reader: an answer in LaTeX becomes a `Node`, or `Unreadable` is raised.

    answer   := element ((','|';'|and|or) element)*          list, unordered
    element  := relation unit?                                a quantity
    relation := sets ((=|<|<=|\in|...) sets)*                 chain
    sets     := sum ((\cup|\cap|\setminus) sum)*
    sum      := sign? product ((+|-|\pm) product)*
    product  := factor (\cdot factor | / factor | factor)*    juxtaposition multiplies
    factor   := atom ('^' .. | '_' .. | '!' | prime)*

Nothing is evaluated and no text is ever passed to an evaluator. Depth and size are bounded.
"""

from __future__ import annotations

from sdjax.rewards import vocabulary as v
from sdjax.rewards.atoms import Atoms
from sdjax.rewards.nodes import EMPTY_SET, Node, Unreadable, num
from sdjax.rewards.tokens import prepare, tokenize

RELATIONS = frozenset({"=", "<", ">", "<=", ">=", "!=", "in", "equiv"})
SET_OPERATORS = {"cup": "union", "cap": "inter", "setminus": "minus"}
MAX_ITEMS = 64
TRAILING = (".", ",", ";", "\\\\")  # punctuation of the sentence around an answer


def read(text: str) -> Node:
    """The tree of an answer; raises Unreadable, TooBig (both ValueErrors)."""
    tokens = tokenize(prepare(text))
    if not tokens:
        raise Unreadable("nothing but spaces and styles")
    if tokens[-1].kind == "op" and tokens[-1].text in TRAILING:
        tokens.pop()  # one mark only: `25...` goes on
    reader = Reader(tokens)
    answer = reader.answer()
    if not reader.at_end():
        raise Unreadable(f"left over: {reader.peek().text!r}")
    return answer


def hedging(word: str) -> bool:
    """Whether a word behind a value takes the value back, or changes it."""
    known = word in v.HEDGES or word in v.NUMBER_WORDS or word in v.MULTIPLIERS
    return known or word.endswith("n't")


class Reader(Atoms):
    """The upper half of the grammar; `Atoms` has the lower."""

    def answer(self) -> Node:
        """A list of elements at top level; one element is itself."""
        items, hedged = self.items(end=())
        if len(items) == 1:
            return items[0]
        return Node("orlist" if hedged else "list", tuple(items))

    def items(self, end: tuple[str, ...]) -> tuple[list[Node], bool]:
        """Elements up to a token of `end` (not consumed), and whether "or" joined any."""
        items: list[Node] = []
        hedged = False
        while not self.at_end() and not self.is_op(*end):
            items.append(self.element())
            if len(items) > MAX_ITEMS:
                raise Unreadable("too many items")
            separators = 0
            while self.is_op(",", ";") or self.is_word("and", "or"):
                hedged |= self.is_word("or")
                self.next()
                separators += 1
            if not separators:
                break
            if self.at_end() or self.is_op(*end):
                raise Unreadable("list ends in a separator")
        return items, hedged

    def element(self) -> Node:
        """A relation or value with its unit."""
        self.enter()
        value = self.relation()
        value = self.unit(value)
        self.leave()
        return value

    def relation(self) -> Node:
        """A chain of relations, or the single member."""
        members, ops = [self.member()], []
        while self.is_op(*RELATIONS):
            ops.append(self.next().text)
            members.append(self.member())
            if len(members) > 12:
                raise Unreadable("chain too long")
        if self.is_op("pmod", "mod"):
            return self.modulus(members, ops)
        if not ops:
            return members[0]
        return Node("rel", (tuple(ops), tuple(members)))

    def modulus(self, members: list[Node], ops: list[str]) -> Node:
        r"""`x \equiv r \pmod m`, or `r \pmod m`."""
        self.next()
        value = Node("residue", (members[-1], self.atom()))
        if not ops:
            return value
        if len(ops) > 1 or ops[0] not in ("equiv", "="):
            raise Unreadable("chain before a modulus")
        return Node("rel", (("=",), (members[0], value)))

    def member(self) -> Node:
        """One side of a relation: words as a name, a set expression, a value (with unit)."""
        if name := self.leading_name():
            return name
        left = self.additive()
        if self.is_op(":"):
            left = self.ratio(left)
        while self.is_op(*SET_OPERATORS):
            op = SET_OPERATORS[self.next().text]
            left = Node(op, (left, self.additive()))
        if self.peek().kind == "word" and self.unit_then_relation():
            left = self.unit(left)
        return left

    def ratio(self, first: Node) -> Node:
        """a : b, or more terms."""
        terms = [first]
        while self.is_op(":"):
            self.next()
            terms.append(self.additive())
        return Node("ratio", tuple(terms))

    def leading_name(self) -> Node | None:
        r"""`\text{Total} =`: words directly before an equals sign are a name."""
        start = self.position
        words = []
        while self.peek().kind in ("word", "sym") and not self.is_word("and", "or", "not"):
            words.append(self.next().text)
        if words and self.is_op("=", ":") and any(len(w) > 1 for w in words):
            kinds = {token.kind for token in self.tokens[start : self.position]}
            if "word" in kinds:
                if self.is_op(":"):
                    raise Unreadable("words before a colon")
                return Node("name", (" ".join(words),))
        self.position = start
        return None

    def unit_then_relation(self) -> bool:
        """Whether the words here are a unit with the chain going on behind it."""
        ahead = self.position
        while self.token_at(ahead).kind == "word":
            ahead += 1
        return self.token_at(ahead).text in RELATIONS

    def unit(self, value: Node) -> Node:
        """Attach trailing words as a unit; hedging words make the answer unreadable."""
        words: list[str] = []
        factor = 1
        while not self.is_word("and", "or"):
            if self.unit_fraction_ahead():
                words.append(self.unit_fraction())
                continue
            if self.peek().kind != "word":
                break
            word = self.next().text
            if word.lower() in ("squared", "cubed") and words and words[-1].lower() in v.UNITS:
                continue
            if word.lower() in v.MULTIPLIERS and not words:
                factor *= v.MULTIPLIERS[word.lower()]
                words.append("")
                continue
            if hedging(word.lower()):
                raise Unreadable(f"hedge {word!r}")
            words.append(word)
            self.unit_power(words)
        if self.is_op("%"):
            self.next()
            words.append("%")
        words = [word for word in words if word]
        if factor != 1:
            value = Node("mul", (value, num(factor)))
        return Node("quantity", (value, " ".join(words))) if words else value

    def unit_power(self, words: list[str]) -> None:
        r"""`^2`, `/` and `\cdot` between words of a unit."""
        if self.is_op("^") and (power := self.small_power()) is not None:
            words[-1] += f"^{power}"
        while self.is_op("/", "*") and self.token_at(self.position + 1).kind == "word":
            words.append(self.next().text)

    def unit_fraction(self) -> str:
        r"""\frac{\text{miles}}{\text{hour}} as `miles/hour`."""
        self.next()
        sides = []
        for _ in range(2):
            self.expect("{")
            words: list[str] = []
            while self.peek().kind == "word" and self.peek().text.lower() not in v.HEDGES:
                words.append(self.next().text)
                self.unit_power(words)
            self.expect("}")
            sides.append(" ".join(words))
        return "/".join(sides)

    def small_power(self) -> str | None:
        """Exponent of a unit: one number, perhaps braced and signed."""
        self.next()
        braced = self.is_op("{") and bool(self.next())
        sign = self.next().text if self.is_op("-") else ""
        if self.peek().kind != "num":
            raise Unreadable("power of a unit")
        digits = self.next().text
        if braced:
            self.expect("}")
        return sign + digits

    def bracketed(self) -> Node:
        """( ... ), [ ... ], and their half-open mixtures; one item in a matching pair is itself."""
        opening = self.next().text
        items, _ = self.items(end=(")", "]"))
        closing = self.next().text if self.is_op(")", "]") else None
        if closing is None:
            raise Unreadable("unclosed bracket")
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return Node("group", (items[0],))
        if not items:
            raise Unreadable("empty brackets")
        return Node("seq", (opening, closing, tuple(items)))

    def angled(self) -> Node:
        r"""\langle a, b \rangle: a vector."""
        self.next()
        items, _ = self.items(end=("rangle",))
        self.expect("rangle")
        return Node("seq", ("(", ")", tuple(items)))

    def braced_set(self) -> Node:
        r"""\{ ... \}, or \{x : condition\}."""
        self.next()
        if (builder := self.set_builder()) is not None:
            return builder
        items, hedged = self.items(end=("\\}",))
        self.expect("\\}")
        if hedged:
            raise Unreadable("or inside a set")
        return Node("set", tuple(items)) if items else EMPTY_SET

    def set_builder(self) -> Node | None:
        r"""The rest of \{x \mid ...\} or \{x \in R : ...\}, or None where it is none."""
        start = self.position
        variable = self.next()
        over_reals = self.is_op("in") and self.token_at(self.position + 1).text == "R"
        if over_reals:
            self.position += 2
        if variable.kind != "sym" or not self.is_op("|", ":"):
            self.position = start
            return None
        self.next()
        conditions, hedged = self.items(end=("\\}",))
        self.expect("\\}")
        return Node("builder", (variable.text, hedged, tuple(conditions)))
