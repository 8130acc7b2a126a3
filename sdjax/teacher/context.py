"""What the teacher sees: for each rollout the privileged prompt, or the fact that there is none.

The order of operations is that of the reference (METHODS 3.2): successes by threshold; per group
the first (or a random) successful sibling, the rollout itself left out; its text, thinking removed
if asked; feedback where it is allowed; one user turn from the templates; the student's own chat
template; a length limit. A rollout that ends up without privileged text has no teacher and is
masked from distillation, never silently trained on. Every branch is counted.

Does not know who the teacher is (its weights), and never imports jax.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from sdjax.data import chat
from sdjax.data.prompts import problem_messages, question_of
from sdjax.records import Problem, Rollout, TeacherContext
from sdjax.teacher.templates import Templates, templates
from sdjax.teacher.thinking import STRIPPERS

KINDS = ("sibling", "solution", "feedback", "instruction")
NO_TEACHER = TeacherContext(prompt_tokens=None, kind="none")


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """The fields of config.teacher.context, explained there. `from_config` reads them all."""

    kind: str = "sibling"
    fallback: str = "none"
    success_threshold: float = 0.5
    self_exclude: bool = True
    strip_think: bool = False
    strip_style: str = "analysis"
    choice: str = "first"
    use_feedback: bool = False
    feedback_only_without_solution: bool = True
    reveal_ratio: float = 1.0
    template: str = "paper"
    solution_template: str = ""
    feedback_template: str = ""
    thinking: str = "student"
    max_len: int = 22528
    truncate: str = "demonstration"

    def __post_init__(self):
        self.templates()  # a bad template is an error before the run, not after the first batch

    @classmethod
    def from_config(cls, c) -> ContextConfig:
        """From the whole config or from its section `teacher.context`."""
        section = c.teacher.context if "teacher" in c else c
        return cls(**{f.name: section[f.name] for f in dataclasses.fields(cls)})

    def templates(self) -> Templates:
        """The templates with the config's replacements."""
        return templates(self.template, self.solution_template, self.feedback_template)

    def teacher_thinking(self, student: bool | None) -> bool | None:
        """`enable_thinking` of the teacher's chat template: the student's unless set otherwise."""
        return {"student": student, "on": True, "off": False}[self.thinking]


@dataclasses.dataclass(frozen=True)
class View:
    """Privileged text chosen for one rollout, before any template.

    `source` is the index of the sibling shown, None for a dataset solution or none at all; `kind`
    names the branch as in TeacherContext.
    """

    kind: str
    solution: str | None = None
    feedback: str | None = None
    source: int | None = None


def choose_siblings(
    groups: Sequence[Hashable],
    rewards: Sequence[float],
    cfg: ContextConfig,
    rng: np.random.Generator | None = None,
) -> list[int | None]:
    """Index of the successful sibling whose text each rollout's teacher sees, None without one.

    With `self_exclude` a rollout never sees itself, so a lone success gets None while the failures
    of its group get it. Without, whoever comes first may see itself (as SDPO's dataclass default).
    """
    successes: dict[Hashable, list[int]] = {}
    for i, (group, reward) in enumerate(zip(groups, rewards, strict=True)):
        if reward >= cfg.success_threshold:
            successes.setdefault(group, []).append(i)
    chosen: list[int | None] = []
    for i, group in enumerate(groups):
        candidates = successes.get(group, [])
        if cfg.self_exclude:
            candidates = [j for j in candidates if j != i]
        if not candidates:
            chosen.append(None)
        elif cfg.choice == "random":
            chosen.append(candidates[int(rng.integers(len(candidates)))])
        else:
            chosen.append(candidates[0])
    return chosen


def choose_views(
    groups: Sequence[Hashable],
    rewards: Sequence[float],
    responses: Sequence[str],
    feedback: Sequence[str | None],
    cfg: ContextConfig,
    solutions: Sequence[str | None] | None = None,
    answers: Sequence[str | None] | None = None,
    rng: np.random.Generator | None = None,
) -> list[View]:
    """The privileged text of every rollout (METHODS 3.2, steps 1 to 6), as plain strings."""
    solutions = solutions or [None] * len(groups)
    answers = answers or [None] * len(groups)
    siblings: list[int | None] = [None] * len(groups)
    if cfg.kind == "sibling":
        siblings = choose_siblings(groups, rewards, cfg, rng)
    shown: dict[int, str] = {}
    views = []
    for i, sibling in enumerate(siblings):
        text, kind = None, "none"
        if sibling is not None:
            if sibling not in shown:
                shown[sibling] = demonstration(responses[sibling], answers[sibling], cfg)
            text, kind = shown[sibling], "demonstration"
        elif cfg.kind == "solution" or (cfg.kind == "sibling" and cfg.fallback == "solution"):
            if solutions[i] and solutions[i].strip():
                text, kind = demonstration(solutions[i], answers[i], cfg), "solution"
        used = feedback[i] if _feedback_allowed(cfg, text is not None) else None
        if not _present(used):
            used = None
        if kind == "none" and used is not None:
            kind = "feedback"
        if cfg.kind == "instruction":
            kind = "instruction"
        views.append(View(kind, text, used, sibling))
    return views


def demonstration(text: str, answer: str | None, cfg: ContextConfig) -> str:
    """What is shown of a correct solution: thinking removed, a part held back, as configured."""
    if cfg.strip_think:
        text = STRIPPERS[cfg.strip_style](text)
    return reveal(text, answer, cfg.reveal_ratio) if cfg.reveal_ratio < 1 else text


def reveal(text: str, answer: str | None, ratio: float) -> str:
    """The first floor(ratio * m) of the text's m paragraphs, and the boxed answer always.

    The fixed-exposure form of ATESD (METHODS 7.6); paragraphs as segments are our reading.
    """
    segments = [part for part in text.split("\n\n") if part.strip()]
    shown = "\n\n".join(segments[: int(ratio * len(segments))])
    if answer and f"\\boxed{{{answer}}}" not in shown:
        shown = f"{shown}\n\n\\boxed{{{answer}}}" if shown else f"\\boxed{{{answer}}}"
    return shown


def teacher_messages(
    messages: list[dict[str, str]], question: str, view: View, correct: bool, texts: Templates
) -> list[dict[str, str]]:
    """The teacher's chat: all messages but the last, then one user turn from the templates.

    Without privileged text these are the student's own messages (step 6).
    """
    if view.kind == "none":
        return messages
    turn = texts.user_turn(
        prompt=messages[-1]["content"],
        question=question,
        solution=view.solution,
        feedback=view.feedback,
        assessment="correct." if correct else "incorrect.",
    )
    return [*messages[:-1], {"role": "user", "content": turn}]


def build_contexts(
    rollouts: Sequence[Rollout],
    cfg: ContextConfig,
    tokenizer,
    *,
    enable_thinking: bool | None = None,
    system: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    step: int = 0,
) -> tuple[list[TeacherContext], dict[str, int]]:
    """The teacher's prompt of every rollout, and how often each branch was taken.

    Siblings are rollouts with the same `group`, in list order. `enable_thinking`, `system` and
    `chat_template` must be those of the student's prompt; `seed` and `step` fix random choices.
    The counters are plain counts, so those of several processes add up; `context_metrics` turns
    them into fractions.
    """
    rewards = [r.verdict.reward for r in rollouts]
    feedback = [_feedback_of(r) for r in rollouts]
    texts = _LazyTexts(rollouts, tokenizer)
    views = choose_views(
        [r.group for r in rollouts],
        rewards,
        texts,
        feedback,
        cfg,
        solutions=[r.problem.solution for r in rollouts],
        answers=[r.problem.answer for r in rollouts],
        rng=np.random.default_rng((seed, step)),
    )
    render = _Renderer(cfg, tokenizer, cfg.teacher_thinking(enable_thinking), system, chat_template)
    contexts = [
        render(r.problem, view, reward >= cfg.success_threshold)
        for r, view, reward in zip(rollouts, views, rewards, strict=True)
    ]
    groups = [r.group for r in rollouts]
    return contexts, count_branches(groups, rewards, feedback, views, contexts, cfg)


class _LazyTexts:
    """Decodes a response only when it is shown; two per group are, of eight long ones."""

    def __init__(self, rollouts: Sequence[Rollout], tokenizer):
        self.rollouts, self.tokenizer = rollouts, tokenizer

    def __getitem__(self, i: int) -> str:
        return chat.decode(self.tokenizer, self.rollouts[i].response_tokens)


class _Renderer:
    """Turns a view into tokens within the limit; equal views are rendered and encoded once."""

    def __init__(self, cfg, tokenizer, enable_thinking, system, chat_template):
        self.cfg, self.tokenizer, self.texts = cfg, tokenizer, cfg.templates()
        self.chat = {
            "enable_thinking": enable_thinking,
            "system": system,
            "chat_template": chat_template,
        }
        self.known: dict[Hashable, TeacherContext] = {}

    def __call__(self, problem: Problem, view: View, correct: bool) -> TeacherContext:
        if view.kind == "none":
            return NO_TEACHER
        correct = correct and "{assessment}" in self.texts.reprompt  # else it changes nothing
        key = (problem.id, problem.prompt, view.kind, view.solution, view.feedback, correct)
        if key not in self.known:
            self.known[key] = self._fit(problem, view, correct)
        return self.known[key]

    def _fit(self, problem: Problem, view: View, correct: bool) -> TeacherContext:
        text, tokens = self._render(problem, view, correct)
        excess = len(tokens) - self.cfg.max_len
        if excess <= 0:
            return TeacherContext(tokens, view.kind, text)
        if self.cfg.truncate == "right":
            return TeacherContext(tokens[: self.cfg.max_len], view.kind, text, truncated=True)
        if self.cfg.truncate == "left":
            return TeacherContext(tokens[-self.cfg.max_len :], view.kind, text, truncated=True)
        return self._shorten(problem, view, correct, excess)

    def _shorten(self, problem: Problem, view: View, correct: bool, excess: int) -> TeacherContext:
        """Cuts the demonstration's beginning (its end holds the answer), else the feedback's end.

        What cannot be made to fit, because the question alone is too long, gets no teacher.
        """
        field = "solution" if view.solution is not None else "feedback"
        value = getattr(view, field)
        ids = chat.encode_text(self.tokenizer, value or "")
        while len(ids):
            ids = ids[excess:] if field == "solution" else ids[: max(0, len(ids) - excess)]
            cut = chat.decode(self.tokenizer, ids).strip("\ufffd")  # half of a cut character
            shorter = dataclasses.replace(view, **{field: cut})
            text, tokens = self._render(problem, shorter, correct)
            excess = len(tokens) - self.cfg.max_len
            if excess <= 0 and len(ids):
                return TeacherContext(tokens, view.kind, text, truncated=True)
        return TeacherContext(None, "too_long")

    def _render(self, problem: Problem, view: View, correct: bool) -> tuple[str, np.ndarray]:
        messages = teacher_messages(
            problem_messages(problem), question_of(problem), view, correct, self.texts
        )
        text = chat.render_prompt(self.tokenizer, messages, **self.chat)
        return text, chat.encode_text(self.tokenizer, text)


def count_branches(groups, rewards, feedback, views, contexts, cfg) -> dict[str, int]:
    """How often each branch was taken, as counts that add up over processes and steps."""
    success = [reward >= cfg.success_threshold for reward in rewards]
    successes = Counter(g for g, ok in zip(groups, success, strict=True) if ok)
    kinds = Counter(context.kind for context in contexts)
    shown = [view.solution for view in views if view.solution is not None]
    allowed = cfg.use_feedback or cfg.kind == "feedback"
    return {
        "rollouts": len(views),
        "groups": len(set(groups)),
        "groups_with_success": len(successes),
        "successes": sum(success),
        "lone_successes": sum(1 for n in successes.values() if n == 1),
        "has_teacher": sum(context.has_teacher for context in contexts),
        "demonstration": sum(view.kind == "demonstration" for view in views),
        "self_demonstration": sum(view.source == i for i, view in enumerate(views)),
        "solution": sum(view.kind == "solution" for view in views),
        "instruction": kinds["instruction"],
        "none": kinds["none"],
        "feedback_available": sum(_present(f) for f in feedback) if allowed else 0,
        "feedback_used": sum(view.feedback is not None for view in views),
        "empty_demonstration": sum(not text.strip() for text in shown),
        "unclosed_think": sum("<think>" in text and "</think>" not in text for text in shown),
        "truncated": sum(context.truncated for context in contexts),
        "too_long": kinds["too_long"],
    }


def context_metrics(counts: dict[str, int]) -> dict[str, float]:
    """Fractions for the log; those under self_distillation/ are the reference's (METHODS 3.4)."""
    rollouts, groups = max(1, counts["rollouts"]), max(1, counts["groups"])
    metrics = {
        "self_distillation/success_group_fraction": counts["groups_with_success"] / groups,
        "self_distillation/success_sample_fraction": counts["demonstration"] / rollouts,
        "self_distillation/feedback_available_fraction": counts["feedback_available"] / rollouts,
        "self_distillation/feedback_used_fraction": counts["feedback_used"] / rollouts,
        "self_distillation/reprompt_sample_fraction": counts["has_teacher"] / rollouts,
    }
    for name in (
        "successes",
        "self_demonstration",
        "solution",
        "instruction",
        "none",
        "empty_demonstration",
        "unclosed_think",
        "truncated",
        "too_long",
    ):
        metrics[f"teacher/{name}_frac"] = counts[name] / rollouts
    metrics["teacher/lone_success_group_frac"] = counts["lone_successes"] / groups
    return metrics


def _feedback_of(rollout: Rollout) -> str | None:
    """The verifier's feedback on this response, else the problem's own hint."""
    own = rollout.verdict.feedback
    return own if _present(own) else rollout.problem.feedback


def _feedback_allowed(cfg: ContextConfig, has_solution: bool) -> bool:
    if cfg.kind == "feedback":
        return True
    return cfg.use_feedback and not (has_solution and cfg.feedback_only_without_solution)


def _present(text: str | None) -> bool:
    return text is not None and bool(text.strip())
