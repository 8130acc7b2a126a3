"""A cursor over tokens: looking ahead, taking, and the bound on nesting."""

from __future__ import annotations

from sdjax.rewards.nodes import TooBig, Unreadable
from sdjax.rewards.tokens import Token

MAX_DEPTH = 50
END = Token("end", "")


class Cursor:
    """A cursor over tokens with one position."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def token_at(self, position: int) -> Token:
        """The token at that place, END past the last."""
        return self.tokens[position] if position < len(self.tokens) else END

    def peek(self) -> Token:
        """The next token, not consumed."""
        return self.token_at(self.position)

    def next(self) -> Token:
        """The next token, consumed."""
        token = self.peek()
        self.position += 1
        return token

    def at_end(self) -> bool:
        """Whether every token is consumed."""
        return self.position >= len(self.tokens)

    def is_op(self, *texts: str) -> bool:
        """Whether the next token is one of these operators."""
        token = self.peek()
        return token.kind == "op" and token.text in texts

    def is_word(self, *texts: str) -> bool:
        """Whether the next token is one of these words, in any case (`texts` in lower case)."""
        token = self.peek()
        return token.kind == "word" and token.text.lower() in texts

    def is_cmd(self, *texts: str) -> bool:
        """Whether the next token is one of these LaTeX commands."""
        token = self.peek()
        return token.kind == "cmd" and token.text in texts

    def unit_fraction_ahead(self) -> bool:
        r"""Whether a \frac of words comes, a unit: \frac{\text{km}}{\text{h}}."""
        if not (self.peek().kind == "cmd" and self.peek().text.endswith("frac")):
            return False
        return self.token_at(self.position + 1).text == "{" and (
            self.token_at(self.position + 2).kind == "word"
        )

    def expect(self, text: str) -> None:
        """Consumes that operator; raises Unreadable when something else comes."""
        if not self.is_op(text):
            raise Unreadable(f"expected {text!r} before {self.peek().text!r}")
        self.next()

    def enter(self) -> None:
        """One level deeper; raises TooBig past MAX_DEPTH, before Python's own stack ends."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig("nested too deeply")

    def leave(self) -> None:
        """One level up: pairs with `enter`."""
        self.depth -= 1
