"""The words around privileged text: presets of published methods, and templates from the config.

A template is plain text in which only the placeholders below are replaced, in one pass, so braces
of LaTeX stay as written and a demonstration that contains "{prompt}" is not filled again. Does not
choose what to show (`sdjax.teacher.context`) and does not apply chat templates.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from sdjax.data.prompts import BOXED

REPROMPT_FIELDS = ("prompt", "question", "solution", "feedback", "assessment")
SOLUTION_FIELDS = ("successful_previous_attempt",)
FEEDBACK_FIELDS = ("feedback_raw",)
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")

PAPER_CLOSING = "Correctly solve the original question."
UNCERTAIN_CLOSING = (
    "Solve the original question from scratch with a full, detailed reasoning trace, without "
    "skipping any steps, and include as much uncertainty or ambiguity in the explanation."
)


@dataclasses.dataclass(frozen=True)
class Templates:
    """`reprompt` is the teacher's user turn; `solution` and `feedback` wrap their sections in it.

    Placeholders of `reprompt`: {prompt} the student's user turn, {question} the bare question,
    {solution} and {feedback} the wrapped sections (empty when there is none), {assessment}
    "correct." or "incorrect." for the rollout that is being scored.
    """

    reprompt: str
    solution: str = "{successful_previous_attempt}"
    feedback: str = "{feedback_raw}"

    def __post_init__(self):
        _check("template", self.reprompt, REPROMPT_FIELDS, ("prompt", "question"))
        _check("solution_template", self.solution, SOLUTION_FIELDS, SOLUTION_FIELDS)
        _check("feedback_template", self.feedback, FEEDBACK_FIELDS, FEEDBACK_FIELDS)

    def user_turn(
        self,
        *,
        prompt: str,
        question: str,
        solution: str | None = None,
        feedback: str | None = None,
        assessment: str = "",
    ) -> str:
        """The teacher's user turn; a missing solution or feedback leaves its section empty."""
        return fill(
            self.reprompt,
            prompt=prompt,
            question=question,
            solution=""
            if solution is None
            else fill(self.solution, successful_previous_attempt=solution),
            feedback="" if feedback is None else fill(self.feedback, feedback_raw=feedback),
            assessment=assessment,
        )


def fill(template: str, **values: str) -> str:
    """Replaces {name} for the given names only; every other brace stays."""
    return _PLACEHOLDER.sub(lambda m: values.get(m.group(1), m.group(0)), template)


def _check(field: str, text: str, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    names = _PLACEHOLDER.findall(text)
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if near and name not in known:
            raise ValueError(
                f"config.teacher.context.{field} contains {{{name}}}: did you mean {{{near[0]}}}?"
            )
    if not set(names) & set(needed):
        wanted = " or ".join(f"{{{name}}}" for name in needed)
        raise ValueError(
            f"config.teacher.context.{field} is {text[:60]!r}, which is no preset "
            f"({', '.join(PRESETS)}) and as a text lacks {wanted}: add it"
        )


_PAPER_SOLUTION = "\nCorrect solution:\n\n{successful_previous_attempt}"
_PAPER_FEEDBACK = (
    "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
)
_OPSD_CLOSING = (
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning "
    "behind each step — do not copy or paraphrase it. Now, using your own words and independent "
    "reasoning, derive the same final answer to the problem above. Think step by step, explore "
    "different approaches, and don't be afraid to backtrack or reconsider if something doesn't "
    "work out:\n"
)
_OPSD_A_CLOSING = (
    "\n\nAfter understanding the reference solution and the rationale behind each step, now "
    "articulate your own step-by-step reasoning that derives the same final answer to the problem "
    "below:\n"
)
_CONCISE = (
    "Solve the following math problem concisely and correctly. Be direct — avoid unnecessary "
    "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
    "needed to reach the answer."
)

PRESETS: dict[str, Templates] = {}
PRESETS |= {
    # The YAML that the released SDPO and the paper's runs read (actor.yaml:130-148).
    "paper": Templates(
        "{prompt}{solution}{feedback}\n\n" + PAPER_CLOSING, _PAPER_SOLUTION, _PAPER_FEEDBACK
    ),
    # The dataclass defaults of SDPO and TRL: the same words, more blank lines.
    "trl": Templates(
        "{prompt}{solution}{feedback}\n\n" + PAPER_CLOSING + "\n",
        _PAPER_SOLUTION + "\n\n",
        _PAPER_FEEDBACK + "\n\n",
    ),
    # The paper's closing line of App. C, in the training prompt.
    "uncertainty": Templates(
        "{prompt}{solution}{feedback}\n\n" + UNCERTAIN_CLOSING, _PAPER_SOLUTION, _PAPER_FEEDBACK
    ),
    # The paper's analysis script (eval_with_hint.py:60-73) and its uncertainty variant.
    "hint": Templates(
        "{prompt}{solution}\n\n" + PAPER_CLOSING,
        "\n\nCorrect solution: {successful_previous_attempt}",
    ),
    "hint_uncertainty": Templates(
        "{prompt}{solution}\n\n" + UNCERTAIN_CLOSING,
        "\n\nCorrect solution: {successful_previous_attempt}",
    ),
    # OPSD of 18 March 2026 and later, and its first release (METHODS 4).
    "opsd": Templates(
        "Problem: {question}\n\nHere is a reference solution to this problem:\n"
        "=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n"
        + _OPSD_CLOSING
        + BOXED
    ),
    "opsd_a": Templates(
        "{question}\n\nHere is a reference solution to this problem:\n{solution}\n"
        + _OPSD_A_CLOSING
        + BOXED
    ),
    # AntiSD (METHODS 7.1; its line breaks are our reading).
    "antisd": Templates(
        "{prompt}\n\nYour previous attempt:\n{solution}\n\nPrevious assessment: Your answer is "
        "{assessment}\n\nNow solve this problem step by step."
    ),
    # SDFT's repository, and TRL's form of it.
    "sdft": Templates(
        "\n{prompt}\n\nThis is an example for a response to the question:\n{solution}\n\n"
        "Now answer with a response of your own, including the thinking process:\n"
    ),
    "sdft_trl": Templates("{prompt}\n\n{solution}{feedback}"),
    # OPSDC's conciseness instruction, no privileged text (prompts.json: length_prune_teacher).
    "concise": Templates(
        _CONCISE + "\n\nThe last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    # The same for answers in a box, as the verifiers here read them.
    "concise_boxed": Templates(_CONCISE + "\n\n{question}\n" + BOXED),
}


def templates(template: str, solution: str = "", feedback: str = "") -> Templates:
    """A preset by name, or the text itself; non-empty `solution` and `feedback` replace sections.

    With a text of one's own the sections default to the paper's. `{{}}`, as templates for Python's
    str.format write an empty box, is read as `{}`. Raises ValueError for a text that shows no
    question or misspells a placeholder.
    """
    base = PRESETS.get(template)
    if base is None:
        base = dataclasses.replace(PRESETS["paper"], reprompt=template.replace("{{}}", "{}"))
    return dataclasses.replace(
        base,
        solution=solution.replace("{{}}", "{}") or base.solution,
        feedback=feedback.replace("{{}}", "{}") or base.feedback,
    )


def hint_messages(
    messages: list[dict[str, str]], solution: str, preset: str = "hint"
) -> list[dict[str, str]]:
    """The paper's guided generation prompt (METHODS 6.1): the solution in every user turn."""
    return [
        message if message["role"] != "user" else _hinted(message["content"], solution, preset)
        for message in messages
    ]


def _hinted(prompt: str, solution: str, preset: str) -> dict[str, str]:
    turn = PRESETS[preset].user_turn(prompt=prompt, question=prompt, solution=solution)
    return {"role": "user", "content": turn}
