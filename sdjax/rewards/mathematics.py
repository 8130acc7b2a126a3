r"""The default reward: is the content of the last \boxed{...} equal to the gold?

Order of decisions: extraction, exact text, plain numbers (all in the trainer), then in a worker:
letters and words as text, our own reader with exact comparison, and math-verify for what that
reader does not know (`sdjax.rewards.fallback`, behind static guards and a veto).
"""

from __future__ import annotations

import re

from sdjax.records import Verdict
from sdjax.rewards.extract import boxed_answer, missing
from sdjax.rewards.nodes import Node, UnknownNotation, Unreadable
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.quick import quick_equal, squeeze
from sdjax.rewards.registry import Reward

_BASED = re.compile(r"\(?([0-9A-Z]+)\)?_\(?([0-9]+|[a-z]+)\)?")
_DOLLAR_SIGN = re.compile(r"\\(?:\$|(?:math|text)dollar)")
_NO_PRICE = ("quantity", "rel", "list", "orlist", "set", "seq")


def unboxed_gold(gold: str) -> str:
    r"""The gold without a \boxed{} of its own."""
    if "\\boxed" not in gold:
        return gold
    return boxed_answer(gold)[0] or gold


def extract(response: str, gold: str, config: RewardConfig) -> Verdict | str:
    """A verdict where text or plain numbers decide, else the box for a worker."""
    answer, reason = boxed_answer(response, config)
    if answer is None:
        return missing(reason)
    return decide_directly(answer, gold, config)


def decide_directly(answer: str, gold: str, config: RewardConfig) -> Verdict | str:
    """A verdict on an extracted answer where no worker is needed, else the answer."""
    gold = unboxed_gold(gold or "")
    if not gold.strip():
        return missing("empty_gold")
    if len(answer) > config.max_answer_chars + len(gold):
        return Verdict(squeeze(answer) == squeeze(gold), answer[:100], "too_long")
    decided = quick_equal(answer, gold)
    if decided is None:
        return answer
    return Verdict(decided, answer, "equal" if decided else "different")


def judge(answer: str, gold: str, config: RewardConfig) -> Verdict:
    """Mathematical equality of a box and the gold."""
    gold = unboxed_gold(gold)
    decided, reason = decide(answer, gold)
    if decided is None and config.fallback:
        from sdjax.rewards.fallback import fallback_equal

        decided, reason = fallback_equal(answer, gold)
    return Verdict(decided is True, answer, reason)


def decide(answer: str, gold: str) -> tuple[bool | None, str]:
    """(verdict, reason) by our own reader; None where it cannot decide."""
    from sdjax.rewards import equality, words

    if choice := words.gold_letter(gold):
        letter, styled = choice
        if words.same_letter(letter, styled, answer):
            return True, "equal"
        if styled:
            return False, "different"
    if (based := same_based(answer, gold)) is not None:
        return based, "equal" if based else "different"
    gold_node, gold_unknown = _read(gold)
    if gold_node is None or gold_node.op == "words":
        if words.same_words(gold, answer):
            return True, "equal"
        if gold_node is not None:
            return False, "different"
    elif words.same_text(gold, answer):
        return True, "equal"
    answer_node, answer_unknown = _read(answer)
    if gold_node is None or answer_node is None:
        # a syntax error is wrong; a command that we do not have may be known to math-verify
        return None if gold_unknown or answer_unknown else False, "unreadable"
    if answer_node.op == "words":
        return False, "different"
    try:
        same = equality.same_answer(_in_dollars(gold, gold_node), _in_dollars(answer, answer_node))
    except Unreadable:
        return False, "unreadable"
    except (ValueError, RecursionError):
        return False, "too_big"
    return same, {True: "equal", False: "different", None: "undecided"}[same]


def _in_dollars(text: str, node: Node) -> Node:
    r"""A single value behind a dollar sign has a unit: `\$5` is not `5 \text{ cents}`."""
    if not _DOLLAR_SIGN.search(text) or node.op in _NO_PRICE:
        return node
    return Node("quantity", (node, "dollars"))


def _read(text: str) -> tuple[Node | None, bool]:
    """(tree or None, whether only an unknown command was in the way)."""
    try:
        return read_answer(text), False
    except UnknownNotation:
        return None, True
    except (ValueError, RecursionError):
        return None, False


def read_answer(text: str) -> Node:
    """The tree of an answer, or a `words` node; raises ValueError where it is neither."""
    from sdjax.rewards import words
    from sdjax.rewards.reader import read
    from sdjax.rewards.tokens import prepare, tokenize

    if (number := words.number_word(text)) is not None:
        return number
    tokens = tokenize(prepare(text))
    if words.is_words(tokens):
        try:
            return read(text)
        except ValueError:
            return Node("words", (words.plain_text(text).casefold(),))
    return read(text)


def same_based(answer: str, gold: str) -> bool | None:
    """Numbers written in a base: equal digits and equal base; None where the gold has none."""
    wanted, found = based_number(gold), based_number(answer)
    if wanted is None:
        return None
    if found is None:
        # the question states the base: the bare digits are the answer too
        return None if "=" in answer else squeeze(answer).lstrip("0") == wanted[0]
    return found == wanted


def based_number(text: str) -> tuple[str, int] | None:
    """(digits, base) of `2A_{16}`, or None."""
    from sdjax.rewards.vocabulary import NUMBER_WORDS
    from sdjax.rewards.words import plain_text

    match = _BASED.fullmatch(plain_text(text))
    if not match:
        return None
    digits, label = match.groups()
    base = NUMBER_WORDS.get(label, int(label) if label.isdecimal() and len(label) < 3 else 0)
    if not 2 <= base <= 36 or not any(char.isdecimal() for char in digits):
        return None
    try:
        int(digits[:4000], base)
    except ValueError:
        return None
    return digits.lstrip("0") or "0", base


MATH = Reward(name="math", extract=extract, judge=judge)
