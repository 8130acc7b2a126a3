"""Text cases made by running the reference code: our teacher context, equal to the character."""

import json

import pytest

from sdjax.teacher.context import (
    ContextConfig,
    View,
    choose_views,
    context_metrics,
    count_branches,
    teacher_messages,
)
from sdjax.teacher.templates import hint_messages
from sdjax.teacher.thinking import strip_analysis, strip_sdpo, strip_trl

NAMES = {  # the reference's field -> ours
    "include_environment_feedback": "use_feedback",
    "environment_feedback_only_without_solution": "feedback_only_without_solution",
    "dont_reprompt_on_self_success": "self_exclude",
    "remove_thinking_from_demonstration": "strip_think",
    "success_reward_threshold": "success_threshold",
    "reprompt_template": "template",
    "solution_template": "solution_template",
    "feedback_template": "feedback_template",
}
SDPO_YAML = {"use_feedback": True, "strip_think": True, "strip_style": "sdpo"}


def cases(shared_dir, name):
    return json.loads((shared_dir / "fixtures" / f"{name}.json").read_text())


def test_teacher_context_equals_the_reference(shared_dir):
    """Messages, mask and metrics of eight rollouts in three groups, under every released switch."""
    for case in cases(shared_dir, "text_teacher_context"):
        cfg = ContextConfig(**SDPO_YAML | {NAMES[k]: v for k, v in case["overrides"].items()})
        data = case["inputs"]
        views = choose_views(data["uids"], data["scores"], data["responses"], data["feedback"], cfg)
        for i, (view, expected) in enumerate(zip(views, case["messages"], strict=True)):
            question = f"Q{data['uids'][i]}"
            student = [
                {"role": "system", "content": "SYS"},
                {"role": "user", "content": question},
            ]
            messages = teacher_messages(student, question, view, False, cfg.templates())
            assert messages == expected, (case["overrides"], i)
        assert [float(v.kind != "none") for v in views] == case["self_distillation_mask"]
        contexts = [_Context(v.kind != "none", v.kind) for v in views]
        counts = count_branches(
            data["uids"], data["scores"], data["feedback"], views, contexts, cfg
        )
        metrics = context_metrics(counts)
        for name, value in case["metrics"].items():
            assert metrics[name] == pytest.approx(value), (case["overrides"], name)


class _Context:
    """The part of a TeacherContext that counting looks at."""

    def __init__(self, has_teacher, kind):
        self.has_teacher, self.kind, self.truncated = has_teacher, kind, False


def test_think_removal_equals_all_three_references(shared_dir):
    for case in cases(shared_dir, "text_remove_thinking"):
        assert strip_sdpo(case["input"]) == case["sdpo"]
        assert strip_analysis(case["input"]) == case["analysis"]
        assert strip_trl(case["input"]) == case["trl"]


def test_hint_prompt_equals_the_analysis_script(shared_dir):
    for case in cases(shared_dir, "text_hint_prompt"):
        assert hint_messages(case["messages"], case["solution"]) == case["out"]


def test_the_hint_goes_into_every_user_turn():
    """As the analysis script does, unlike the training prompt; other roles stay."""
    messages = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    hinted = hint_messages(messages, "S")
    tail = "\n\nCorrect solution: S\n\nCorrectly solve the original question."
    assert [m["content"] for m in hinted] == ["Q1" + tail, "A1", "Q2" + tail]


def test_the_last_message_alone_is_replaced():
    """Earlier turns stay; METHODS 3.2 step 7."""
    student = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    view = View("demonstration", solution="D")
    messages = teacher_messages(student, "Q2", view, True, ContextConfig().templates())
    assert messages[:3] == student[:3]
    assert messages[3]["content"] == (
        "Q2\nCorrect solution:\n\nD\n\nCorrectly solve the original question."
    )
