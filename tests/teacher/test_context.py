"""Cases a person can check by hand: who sees whom or nothing, what is cut, what is counted."""

import dataclasses

import numpy as np
import pytest

from sdjax.data import chat
from sdjax.data.prompts import problem_messages
from sdjax.teacher.context import (
    ContextConfig,
    build_contexts,
    choose_siblings,
    context_metrics,
    reveal,
)

C = ContextConfig


def siblings(rewards, groups=None, **changes):
    groups = groups or [0] * len(rewards)
    rng = np.random.default_rng(changes.pop("seed", 0))
    return choose_siblings(groups, rewards, C(**changes), rng)


def test_lone_success_gets_no_signal_and_the_failures_do():
    assert siblings([0, 1, 0]) == [1, None, 1]


def test_none_correct_gives_no_context_to_anybody():
    assert siblings([0, 0, 0]) == [None, None, None]


def test_the_author_of_the_shared_demonstration_uses_the_second_success():
    assert siblings([0, 1, 1, 1]) == [1, 2, 1, 1]


def test_without_self_exclusion_the_first_success_sees_itself():
    assert siblings([0, 1, 1], self_exclude=False) == [1, 1, 1]
    assert siblings([0, 1, 0], self_exclude=False) == [1, 1, 1]


def test_groups_never_mix_even_for_the_same_question():
    """|D| = 1: 64 groups of one question; a success of one group must not help another."""
    assert siblings([1, 0, 0, 0], groups=["a", "a", "b", "b"]) == [None, 0, None, None]


def test_groups_may_be_interleaved_and_order_is_that_of_the_list():
    assert siblings([0, 1, 1, 1], groups=[7, 8, 7, 8]) == [2, 3, None, 1]


def test_threshold_is_inclusive():
    assert siblings([0.5, 0.0], success_threshold=0.5) == [None, 0]
    assert siblings([0.5, 0.0], success_threshold=0.51) == [None, None]


def test_random_choice_is_seeded_uses_every_success_and_never_the_rollout_itself():
    rewards = [1] * 5 + [0]
    seen = set()
    for seed in range(40):
        chosen = siblings(rewards, choice="random", seed=seed)
        assert chosen == siblings(rewards, choice="random", seed=seed)
        assert all(j != i for i, j in enumerate(chosen))
        seen.add(chosen[5])
    assert seen == {0, 1, 2, 3, 4}


def build(rollouts, tokenizer, **changes):
    extra = {k: changes.pop(k) for k in ("enable_thinking", "system", "seed") if k in changes}
    return build_contexts(rollouts, C(**changes), tokenizer, **extra)


def test_tokens_are_those_of_the_rendered_chat(tokenizer, make_rollout):
    """The teacher's prompt must go through the same template and encoder as the student's."""
    history = [{"role": "system", "content": "S"}]
    rollouts = [
        make_rollout("<think>x</think>\n\nD", True, history=history),
        make_rollout("bad", False, history=history),
    ]
    contexts, counts = build(rollouts, tokenizer, enable_thinking=False)
    assert contexts[0].prompt_tokens is None and contexts[0].kind == "none"
    expected = (
        "<|system|>S<|end|><|user|>Q0\nCorrect solution:\n\n<think>x</think>\n\nD\n\n"
        "Correctly solve the original question.<|end|><|assistant|><think>\n\n</think>\n\n"
    )
    assert contexts[1].text == expected
    assert chat.decode(tokenizer, contexts[1].prompt_tokens, False) == expected
    assert contexts[1].prompt_tokens.dtype == np.int32
    assert (counts["lone_successes"], counts["has_teacher"], counts["none"]) == (1, 1, 1)


def test_thinking_switch_of_the_teacher_can_differ(tokenizer, make_rollout):
    """OPSD trains a non-thinking student on a thinking teacher."""
    rollouts = [make_rollout("D", True), make_rollout("bad", False)]
    off, _ = build(rollouts, tokenizer, enable_thinking=True, thinking="off")
    on, _ = build(rollouts, tokenizer, enable_thinking=False, thinking="on")
    assert off[1].text.endswith("</think>\n\n")
    assert on[1].text.endswith("<|assistant|>")


def test_thinking_is_removed_on_request_only(tokenizer, make_rollout):
    rollouts = [make_rollout("thought\n</think>\n\nD", True), make_rollout("bad", False)]
    kept, _ = build(rollouts, tokenizer)
    assert "thought" in kept[1].text
    stripped, _ = build(rollouts, tokenizer, strip_think=True)
    assert "solution:\n\nD\n\nCorrectly" in stripped[1].text


def test_fallback_to_the_dataset_solution(tokenizer, make_rollout):
    """AntiSD: a correct sibling, else the data set's solution; so the lone success has one too."""
    rollouts = [
        make_rollout("D", True, solution="SOL"),
        make_rollout("bad", False, solution="SOL"),
        make_rollout("bad", False, group=1, solution="SOL1"),
        make_rollout("bad", False, group=2),
    ]
    contexts, counts = build(rollouts, tokenizer, fallback="solution")
    assert [c.kind for c in contexts] == ["solution", "demonstration", "solution", "none"]
    assert "SOL1" in contexts[2].text
    assert (counts["demonstration"], counts["solution"]) == (1, 2)


def test_kind_solution_ignores_siblings(tokenizer, make_rollout):
    rollouts = [make_rollout("D", True, solution="SOL"), make_rollout("bad", False)]
    contexts, _ = build(rollouts, tokenizer, kind="solution")
    assert [c.kind for c in contexts] == ["solution", "none"]
    assert "SOL" in contexts[0].text


def test_feedback_rules(tokenizer, make_rollout):
    """Own feedback beats the problem's hint; blank feedback is none; a solution displaces it."""
    rollouts = [
        make_rollout("D", True),
        make_rollout("bad", False, feedback="own"),
        make_rollout("bad", False, group=1, feedback=" ", hint="hint"),
        make_rollout("bad", False, group=2, feedback="  "),
    ]
    off, counts = build(rollouts, tokenizer)
    assert [c.kind for c in off] == ["none", "demonstration", "none", "none"]
    assert counts["feedback_available"] == 0
    without, counts = build(rollouts, tokenizer, use_feedback=True)
    assert [c.kind for c in without] == ["none", "demonstration", "feedback", "none"]
    assert "own" not in without[1].text and "hint" in without[2].text
    assert (counts["feedback_available"], counts["feedback_used"]) == (2, 1)
    both, counts = build(
        rollouts, tokenizer, use_feedback=True, feedback_only_without_solution=False
    )
    assert "D\nThe following is feedback" in both[1].text and counts["feedback_used"] == 2
    alone, _ = build(rollouts, tokenizer, kind="feedback")
    assert [c.kind for c in alone] == ["none", "feedback", "feedback", "none"]


def test_an_instruction_teaches_every_rollout_and_shows_nothing(tokenizer, make_rollout):
    """OPSDC: no solution, no reward, all rollouts kept."""
    rollouts = [make_rollout("D", True), make_rollout("bad", False)]
    contexts, counts = build(rollouts, tokenizer, kind="instruction", template="concise")
    assert counts["instruction"] == counts["has_teacher"] == 2
    assert all("concisely" in c.text and "Q0" in c.text for c in contexts)
    assert "D\n" not in contexts[1].text


def test_assessment_is_that_of_the_rollout_scored(tokenizer, make_rollout):
    """AntiSD's line says how the scored rollout did, not the solution that is shown."""
    rollouts = [make_rollout("D", True), make_rollout("E", True), make_rollout("bad", False)]
    contexts, _ = build(rollouts, tokenizer, template="antisd")
    assert "answer is correct." in contexts[0].text
    assert "answer is incorrect." in contexts[2].text


LONG = "0123456789" * 30 + " so \\boxed{4}"


def test_truncation_of_the_demonstration_keeps_question_closing_and_answer(tokenizer, make_rollout):
    rollouts = [make_rollout(LONG, True), make_rollout("bad", False)]
    full, _ = build(rollouts, tokenizer)
    limit = len(full[1].prompt_tokens) - 100
    contexts, counts = build(rollouts, tokenizer, max_len=limit)
    assert len(contexts[1].prompt_tokens) == limit and contexts[1].truncated
    assert counts["truncated"] == 1
    text = contexts[1].text
    assert text.startswith("<|user|>Q0\nCorrect solution:\n\n")
    assert text.endswith("boxed{4}\n\nCorrectly solve the original question.<|end|><|assistant|>")


def test_truncation_as_released_and_as_trl(tokenizer, make_rollout):
    """Right loses the assistant header, left loses the question; both are offered, both counted."""
    rollouts = [make_rollout(LONG, True), make_rollout("bad", False)]
    full = build(rollouts, tokenizer)[0][1].prompt_tokens
    right = build(rollouts, tokenizer, max_len=60, truncate="right")[0][1]
    left = build(rollouts, tokenizer, max_len=60, truncate="left")[0][1]
    np.testing.assert_array_equal(right.prompt_tokens, full[:60])
    np.testing.assert_array_equal(left.prompt_tokens, full[-60:])
    assert right.truncated and left.truncated


def test_a_question_over_the_limit_is_masked_and_counted(tokenizer, make_rollout):
    rollouts = [make_rollout("D", True), make_rollout("bad", False)]
    contexts, counts = build(rollouts, tokenizer, max_len=20)
    assert contexts[1].prompt_tokens is None and contexts[1].kind == "too_long"
    assert (counts["too_long"], counts["has_teacher"]) == (1, 0)


def test_long_feedback_is_cut_at_its_end(tokenizer, make_rollout):
    rollouts = [make_rollout("bad", False, feedback="Failing case: 1 2 3 " + "x" * 300)]
    contexts, _ = build(rollouts, tokenizer, kind="feedback", max_len=200)
    assert len(contexts[0].prompt_tokens) == 200
    assert "Failing case: 1 2 3" in contexts[0].text
    assert contexts[0].text.endswith("question.<|end|><|assistant|>")


def test_special_tokens_of_a_response_do_not_reach_the_teacher(tokenizer, make_rollout):
    """The end token of a demonstration would end the user's turn in the teacher's prompt."""
    rollouts = [make_rollout("D<|end|>E", True), make_rollout("bad", False)]
    contexts, _ = build(rollouts, tokenizer)
    assert contexts[1].text.count("<|end|>") == 1


def test_system_message_of_the_config_reaches_both(tokenizer, make_rollout):
    rollouts = [make_rollout("D", True), make_rollout("bad", False)]
    contexts, _ = build(rollouts, tokenizer, system="SYS")
    student = chat.render_prompt(tokenizer, problem_messages(rollouts[1].problem), system="SYS")
    assert student.startswith("<|system|>SYS<|end|>")
    assert contexts[1].text.startswith("<|system|>SYS<|end|>")


def test_reveal_shows_a_share_and_always_the_answer():
    text = "a\n\nb\n\nc\n\nd \\boxed{7}"
    assert reveal(text, "7", 0.5) == "a\n\nb\n\n\\boxed{7}"
    assert reveal(text, "7", 0.0) == "\\boxed{7}"
    assert reveal(text, "7", 1.0) == text
    assert reveal(text, None, 0.25) == "a"


def test_counts_add_up_and_fractions_are_of_rollouts(tokenizer, make_rollout):
    rollouts = [
        make_rollout("D", True),
        make_rollout("<think>E", True),
        make_rollout("bad", False),
        make_rollout("bad", False, group=1),
    ]
    contexts, counts = build(rollouts, tokenizer)
    assert counts["has_teacher"] + counts["none"] + counts["too_long"] == counts["rollouts"] == 4
    assert counts["groups"] == 2 and counts["groups_with_success"] == 1
    assert counts["unclosed_think"] == 1  # shown to the first rollout only
    metrics = context_metrics(counts)
    assert metrics["self_distillation/success_group_fraction"] == 0.5
    assert metrics["self_distillation/reprompt_sample_fraction"] == 0.75
    doubled = context_metrics({name: 2 * count for name, count in counts.items()})
    assert doubled == metrics  # counts of two processes add up to the same fractions


def test_config_section_and_dataclass_agree():
    """A default that differs between config.py and the dataclass would change runs in silence."""
    from sdjax import config

    section = config.base().teacher.context
    assert set(section) == {f.name for f in dataclasses.fields(C)}
    assert C.from_config(config.base()) == C()


def test_no_rollouts_at_all(tokenizer):
    contexts, counts = build([], tokenizer)
    assert contexts == [] and context_metrics(counts)["teacher/none_frac"] == 0


@pytest.mark.parametrize("limit", range(90, 380, 29))
def test_whatever_the_limit_it_is_kept(tokenizer, make_rollout, limit):
    rollouts = [make_rollout("é漢 " * 60 + "\\boxed{4}", True), make_rollout("bad", False)]
    contexts, _ = build(rollouts, tokenizer, max_len=limit)
    tokens = contexts[1].prompt_tokens
    assert tokens is None or len(tokens) <= limit
    assert "\ufffd" not in contexts[1].text  # no half of a character that was cut through
