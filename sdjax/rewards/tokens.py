r"""LaTeX answers to tokens: styling falls away, numbers are read whole, words stay words.

A `Token` has a kind: num (value is a Fraction), sym (one letter or Greek name), word (letters of
text mode), func (\sin ...), cmd (a structure such as \frac), set (\mathbb R), op (everything else).
Unknown commands and characters raise `Unreadable`; nothing here looks at meaning.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from sdjax.rewards import vocabulary as v
from sdjax.rewards.nodes import TooBig, UnknownNotation, Unreadable

MAX_TOKENS = 700
MAX_DIGITS = 1200


class Token(NamedTuple):
    """`gap` says what stood before it: "" nothing, " " a blank, "," a thin space of TeX."""

    kind: str
    text: str
    gap: str = ""
    value: Fraction | None = None


_SEPARATOR = r"(?:,\s?\\[!,;:]\s*|\{,\}\s*|\\[,;:]\s*|\\ |~| )"
_GROUPS = re.compile(
    rf"([1-9]\d{{0,2}}(?:{_SEPARATOR}\d{{3}})+)(?![\d]|,\d|{_SEPARATOR}\d)(\.\d+)?", re.ASCII
)
_GROUPS_WITH_COMMAS = re.compile(
    rf"([1-9]\d{{0,2}}(?:(?:,|{_SEPARATOR})\d{{3}})+)(?![\d]|,\d|{_SEPARATOR}\d)(\.\d+)?",
    re.ASCII,
)
_REPEATING = re.compile(
    r"(\d*)\.(\d*)\\(?:overline|bar|dot|overbar)\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII
)
_DECIMAL = re.compile(r"\d+(?:\.\d+)?|\.\d+", re.ASCII)
_SCIENTIFIC = re.compile(r"(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])", re.ASCII)
_ROW_GAP = re.compile(r"\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", re.ASCII)
_OPTION = re.compile(r"\[[a-zA-Z]{1,8}\]\s*(?=\{)", re.ASCII)
_COMMAND = re.compile(r"\\([A-Za-z]+\*?|.)", re.DOTALL)
_LETTERS = re.compile(r"[A-Za-z]+", re.ASCII)
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*", re.ASCII)
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}])")
_GLUED_SPACE = re.compile(r"\\q?quad(?=[A-Za-z])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_HALF_DAY = re.compile(r"([apAP])\.\s?[mM]\.?|([apAP])[mM]\b", re.ASCII)
_BLANK = re.compile(r"[ \t\r\n]+")
_PLAIN_OPS = frozenset("+-*/^_()[]{}|,;:=<>!'&%.?~`@#\"")
_ASCII_RELATIONS = {"<=": "<=", ">=": ">=", "!=": "!=", "==": "=", "**": "^"}
_UNIT_PRODUCT = re.compile(r"\\(?:cdot(?![A-Za-z])|[, ])")
_UNIT_TEXT = re.compile(r"[A-Za-z0-9^{}/\s-]*", re.ASCII)
_EMPHASIS = re.compile(r"\s*(\*\*|__|`)([^*_`]+)\1\s*")
_DOTTED = re.compile(r"(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", re.ASCII)
_NAME_ONLY = re.compile(r"\s*[A-Za-z][A-Za-z .'/-]*[A-Za-z.]\s*", re.ASCII)


def prepare(text: str) -> str:
    """Unicode symbols to LaTeX, and redundant outer braces and dollars away."""
    if emphasis := _EMPHASIS.fullmatch(text):
        text = emphasis.group(2)  # markdown inside the box
    text = text.replace("{:}", ":")
    text = re.sub(v.RAISED, lambda m: "^{" + m.group().translate(v.SUPERSCRIPTS) + "}", text)
    text = re.sub(v.LOWERED, lambda m: "_{" + m.group().translate(v.SUBSCRIPTS) + "}", text)
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)  # commands escaped once too often, as in JSON
    return text.translate(v.UNICODE).strip(" \t\r\n")


def tokenize(text: str) -> list[Token]:
    """Tokens of a prepared answer; raises Unreadable or TooBig."""
    lexer = _Lexer()
    lexer.math(text)
    return lexer.tokens


class _Lexer:
    """Collects tokens; `depth` counts open brackets, inside which a comma separates."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.gap = ""
        self.depth = 0
        self.nesting = 0

    def emit(self, kind: str, text: str, value: Fraction | None = None) -> None:
        """Appends a token; drops empty braces; raises TooBig past MAX_TOKENS."""
        if len(self.tokens) >= MAX_TOKENS:
            raise TooBig("too many tokens")
        if text == "}" and self._empty_group():
            self.tokens.pop()
            return
        self.tokens.append(Token(kind, text, self.gap, value))
        self.gap = ""
        if kind == "op":
            self.depth += (text in ("(", "[", "\\{")) - (text in (")", "]", "\\}"))

    def _empty_group(self) -> bool:
        """Whether a brace that closes now holds nothing, and is no argument of anything."""
        if not self.tokens or self.tokens[-1].text != "{":
            return False
        before = self.tokens[-2] if len(self.tokens) > 1 else None
        return before is None or before.kind in ("num", "sym", "word")

    def widen(self, gap: str) -> None:
        """Notes a gap before the next token; the first one noted stays."""
        self.gap = self.gap or gap

    def math(self, text: str) -> None:
        """Tokenise in math mode."""
        self.nesting += 1
        if self.nesting > 30:
            raise TooBig("styles nested too deeply")
        position = 0
        while position < len(text):
            position = self._math_step(text, position)
        self.nesting -= 1

    def _math_step(self, text: str, at: int) -> int:
        if blank := _BLANK.match(text, at):
            self.widen(" ")
            return blank.end()
        char = text[at]
        if char.isdigit() or (char == "." and text[at + 1 : at + 2].isdigit()) or char == ".":
            if (end := self._number(text, at)) is not None:
                return end
        if char == "\\":
            return self._command(text, at)
        if char == "$":
            return at + 1
        if letters := _LETTERS.match(text, at):
            if letters.group() == "U" and self._between_sets(text, letters.end()):
                self.emit("op", "cup")
            else:
                self._run(letters.group())
            return letters.end()
        if text[at : at + 2] in _ASCII_RELATIONS:
            self.emit("op", _ASCII_RELATIONS[text[at : at + 2]])
            return at + 2
        if char == "~":
            self.widen(" ")
        elif char in _PLAIN_OPS:
            self.emit("op", char)
        else:
            raise Unreadable(f"character {char!r}")
        return at + 1

    def _between_sets(self, text: str, end: int) -> bool:
        """Whether a capital U stands for a union: between a closing and an opening bracket."""
        before = self.tokens[-1].text if self.tokens else ""
        ahead = text[end:].lstrip()[:1]
        return before in (")", "]", "\\}") and ahead in ("(", "[", "\\")

    def _number(self, text: str, at: int) -> int | None:
        """Read a number at `at`, with thousands separators and repeating decimals."""
        if match := _DOTTED.match(text, at):  # dots over the first and the last digit
            whole, fixed, first, middle, last = match.groups()
            self.emit("num", match.group(), _repeating(whole, fixed, first + middle + last))
            return match.end()
        if match := _REPEATING.match(text, at):
            whole, fixed, group, digit = match.groups()
            self.emit("num", match.group(), _repeating(whole, fixed, group or digit))
            return match.end()
        if match := _SCIENTIFIC.match(text, at):
            self.emit("num", match.group(), Fraction(match.group()))
            return match.end()
        after_comma = (
            len(self.tokens) >= 2 and self.tokens[-1].text == "," and not self.gap
        ) and self.tokens[-2].kind == "num"
        scripted = bool(self.tokens) and self.tokens[-1].text in ("_", "^")  # \\log_2 128
        grouped = _GROUPS if self.depth > 0 or after_comma else _GROUPS_WITH_COMMAS
        if not scripted and (match := grouped.match(text, at)):
            digits = re.sub(r"\D", "", match.group(1)) + (match.group(2) or "")
        elif match := _DECIMAL.match(text, at):
            digits = match.group()
        else:
            return None
        if len(digits) > MAX_DIGITS:
            raise TooBig("too many digits")
        self.emit("num", digits, Fraction(digits))
        return match.end()

    def _run(self, letters: str) -> None:
        """A run of bare letters: a known name, a unit after a number, or one symbol a letter."""
        lower = letters.lower()
        if letters in v.FUNCTIONS:
            self.emit("func", letters)
        elif letters in v.RUN_NAMES:
            kind, name = v.RUN_NAMES[letters]
            self.emit(kind, name)
        elif self.tokens and lower in v.BARE_UNITS and self.tokens[-1].text not in "^_{":
            self.emit("word", letters)
        else:
            for letter in letters:
                self.emit("sym", letter)

    def _command(self, text: str, at: int) -> int:
        if glued := _GLUED_SPACE.match(text, at):
            self.widen(" ")
            return glued.end()
        match = _COMMAND.match(text, at)
        if not match:
            raise Unreadable("lone backslash")
        name, end = match.group(1).rstrip("*"), match.end()
        if name in v.THIN or name in v.SPACING or name in ("(", ")", "[", "]", "/", "-"):
            self.widen("," if name in v.THIN else " ")
            return end
        if name in v.CURRENCY:
            self.widen(" ")
            return end
        if name in v.SIZES:
            return self._delimiter(text, end, name)
        if name in v.TEXT_STYLES:
            return self._styled(text, end, self._text_group)
        if name in v.MATH_STYLES:
            return self._styled(text, end, self._math_group)
        if name in v.WITH_DROPPED_ARGUMENT:
            end = self._skip_argument(text, end)
            return self._skip_argument(text, end) if name == "fcolorbox" else end
        if name in v.OPERATORS:
            op = v.OPERATORS[name]
            self.emit("word" if op in ("or", "and") else "op", op)
            if op == "\\\\" and (gap := _ROW_GAP.match(text, end)):
                return gap.end()
        elif name in v.FUNCTIONS or name in v.LIST_FUNCTIONS:
            self.emit("func", name)
        elif name in ("begin", "end"):
            return self._environment(text, end, name)
        elif name in v.NUMBER_SETS:
            self.emit("set", name)
        elif name in ("mathbb", "Bbb"):
            return self._blackboard(text, end)
        elif name in v.GREEK or name in v.ALIASES:
            self.emit("sym", v.ALIASES.get(name, name))
        elif name in v.STRUCTURES:
            self.emit("cmd", name)
        elif name == "_":
            self.emit("op", "blank")
        else:
            raise UnknownNotation(f"command {name!r}")
        return end

    def _delimiter(self, text: str, at: int, size: str) -> int:
        r"""After \left, \right or \big: direct the bar, drop the invisible delimiter."""
        at = _skip_blank(text, at)
        char = text[at : at + 1]
        if char == ".":
            return at + 1
        if char == "|" and size != "middle":
            closing = size == "right" or size.endswith("r")
            opening = size == "left" or size.endswith("l")
            self.emit("op", "rv" if closing else "lv" if opening else "|")
            return at + 1
        if char in "<>" and char:
            self.emit("op", "langle" if char == "<" else "rangle")
            return at + 1
        return at

    def _styled(self, text: str, at: int, inner) -> int:
        """Read the braced argument of a style command with `inner`; a bare one needs nothing."""
        at = _skip_blank(text, at)
        if text[at : at + 1] != "{":
            return at
        end = _closing(text, at)
        inner(text[at + 1 : end])
        return end + 1

    def _text_group(self, content: str) -> None:
        r"""Text mode; mathematics between dollars stays mathematics."""
        if content.strip() in v.TEXT_FUNCTIONS:
            self.emit("func", content.strip())
            return
        pieces = _DOLLAR.split(content)
        for index, piece in enumerate(pieces):
            self.math(piece) if index % 2 else self._text(piece)

    def _math_group(self, content: str) -> None:
        content = content.replace("~", " ")
        if _NAME_ONLY.fullmatch(content):
            name = content.strip()
            if name in v.FUNCTIONS or name in v.LIST_FUNCTIONS:
                self.emit("func", name)
            elif name in v.RUN_NAMES:
                self._run(name)
            else:
                self._text(content)
        elif self._unit_letter(content.strip()):
            self.emit("word", content.strip())
        elif self._units(content):
            self._text(content)
        else:
            self.emit("op", "{")
            self.math(content)
            self.emit("op", "}")

    def _unit_letter(self, letter: str) -> bool:
        """Whether an upright letter is a unit: m, g, s ... after a quantity or a slash."""
        if letter not in v.UNIT_LETTERS or not self.tokens:
            return False
        before = self.tokens[-1]
        if before.text == "*" and len(self.tokens) > 1:
            return self.tokens[-2].kind == "word"
        if before.text == "{" and len(self.tokens) > 2:  # in a \frac behind a number
            two, one = self.tokens[-3:-1]
            return (
                two.kind == "word"
                and one.text == "}"
                or (two.kind == "num" and one.kind == "cmd" and one.text.endswith("frac"))
            )
        return before.kind in ("num", "word") or before.text in (")", "}", "pi", "/")

    def _units(self, content: str) -> bool:
        r"""Whether upright letters with powers are a unit: \mathrm{m^3}, \mathrm{kg\cdot m}."""
        plain = _UNIT_PRODUCT.sub(" ", content)
        names = _LETTERS.findall(plain)
        if not self._unit_letter("m") or not names or not _UNIT_TEXT.fullmatch(plain):
            return False
        return all(name.lower() in v.UNITS or name in v.UNIT_LETTERS for name in names)

    def _text(self, text: str) -> None:
        at = 0
        self.nesting += 1
        if self.nesting > 30:
            raise TooBig("styles nested too deeply")
        while at < len(text):
            if blank := _BLANK.match(text, at):
                self.widen(" ")
                at = blank.end()
            elif time := _HALF_DAY.match(text, at):
                self.emit("word", (time.group(1) or time.group(2)).lower() + "m")
                at = time.end()
            elif word := _WORD.match(text, at):
                single = len(word.group()) == 1 and not _in_sentence(text, word)
                symbol = single and not self._unit_letter(word.group())
                self.emit("sym" if symbol else "word", word.group())
                at = word.end()
            elif text.startswith("--", at):
                raise Unreadable("a range")  # the dash of text mode
            elif text[at] == ".":
                at = self._number(text, at) or at + 1
            else:
                at = self._math_step(text, at)
        self.nesting -= 1
        self.widen(" ")

    def _skip_argument(self, text: str, at: int) -> int:
        at = _skip_blank(text, at)
        if option := _OPTION.match(text, at):
            at = option.end()
        return _closing(text, at) + 1 if text[at : at + 1] == "{" else at

    def _environment(self, text: str, at: int, which: str) -> int:
        at = _skip_blank(text, at)
        if text[at : at + 1] != "{":
            raise Unreadable("environment without a name")
        end = _closing(text, at)
        name = text[at + 1 : end].strip().rstrip("*")
        self.emit("cmd", f"{which} {name}")
        if which == "begin" and name in ("array", "tabular"):
            return self._skip_argument(text, end + 1)
        return end + 1

    def _blackboard(self, text: str, at: int) -> int:
        match = re.compile(r"\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))").match(text, at)
        if not match:
            raise Unreadable("blackboard letter")
        self.emit("set", match.group(1) or match.group(2))
        return match.end()


def _in_sentence(text: str, word: re.Match) -> bool:
    """Whether a one-letter word is the article of a sentence."""
    return word.group() in ("a", "A", "I") and len(_WORD.findall(text)) > 1


def _repeating(whole: str, fixed: str, group: str) -> Fraction:
    if len(whole) + len(fixed) + len(group) > MAX_DIGITS:
        raise TooBig("too many digits")
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return head + Fraction(int(group), 10 ** len(fixed) * (10 ** len(group) - 1))


def _skip_blank(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


def _closing(text: str, at: int) -> int:
    """Index of the brace that closes the one at `at`."""
    depth = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise Unreadable("unclosed brace")
