"""Problem statements as text: the instructions around a question, and the messages of a prompt.

`boxed` is the paper's form of DAPO-Math, `answer_line` the original one. `problem_messages` is the
one place where student and teacher get a problem's messages from; chat templates are applied by
`sdjax.data.chat`.
"""

from __future__ import annotations

import re

from sdjax.records import Problem

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ANSWER_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
ANSWER_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'
STYLES = ("auto", "as_is", "bare", "boxed", "answer_line", "opsd")

_HEAD = re.compile(
    r"Solve the following math problem step by step\.\s*"
    r"The last line of your response should be of the form Answer: \$Answer "
    r"\(without quotes\) where \$Answer is the answer to the problem\.\s*"
)
_TAIL = re.compile(r'Remember to put your answer on its own line after "Answer:"\.?\s*\Z')


def strip_answer_line(text: str) -> str:
    """The question inside DAPO-Math's `Answer:` instructions, outer blanks trimmed."""
    head = _HEAD.match(text)
    text = text[head.end() :] if head else text
    tail = _TAIL.search(text)
    return (text[: tail.start()] if tail else text).strip()


def dapo_to_boxed(text: str) -> str:
    """DAPO-Math's prompt as the paper rewrote it (METHODS 3.6); a bare question gets the suffix."""
    return strip_answer_line(text) + BOXED


def bare(text: str) -> str:
    """The question alone: without the instructions of either style."""
    text = strip_answer_line(text)
    return text.removesuffix(BOXED.strip()).strip() if text.endswith(BOXED.strip()) else text


def styled(text: str, style: str) -> str:
    """The prompt in one of STYLES, whatever style it came in ("as_is" leaves it alone)."""
    if style == "as_is":
        return text
    question = bare(text)
    if style == "bare":
        return question
    if style == "boxed":
        return question + BOXED
    if style == "answer_line":
        return ANSWER_HEAD + question + ANSWER_TAIL
    if style == "opsd":
        return f"Problem: {question}\n{BOXED}"
    raise ValueError(f"prompt style {style!r} is unknown: known are {', '.join(STYLES)}")


def problem_messages(problem: Problem) -> list[dict[str, str]]:
    """The chat messages of a problem: system and earlier turns if any, then the user's turn.

    `problem.meta["history"]` holds the earlier messages where the source has them.
    """
    return [*problem.meta.get("history", ()), {"role": "user", "content": problem.prompt}]


def question_of(problem: Problem) -> str:
    """The question without instructions, for templates that bring their own."""
    return problem.meta.get("question") or bare(problem.prompt)
