"""The synthetic problems, the simulated reasoner and the tiny tokenizer."""

import collections
import dataclasses
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.analysis import epistemic
from sdjax.data import chat, reasoner, synthetic, tiny_tokenizer
from sdjax.rewards import verify

CALCULATIONS = re.compile(r"(\d+)([+*-]|mod)(\d+)=(\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer.load()


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_a_split_is_a_pure_function_and_grows_by_appending(split):
    """Catches state between draws: task coverage |D| nests its sets only if prefixes agree."""
    many = synthetic.make_problems(split, 200, seed=3)
    assert synthetic.make_problems(split, 50, seed=3) == many[:50]
    assert len({p.prompt for p in many}) == 200
    assert {p.prompt for p in synthetic.make_problems(split, 50, seed=4)} != {
        p.prompt for p in many[:50]
    }


def test_no_problem_is_on_both_sides():
    """Catches leaks from training or pretraining into evaluation, for any pair of seeds."""
    sides = {False: set(), True: set()}
    for split in synthetic.SPLITS:
        count = 200 if split == "easy_test" else 800  # of 424 that there are
        for seed in (0, 1):
            sides[split in ("train", "pretrain", "easy")] |= {
                p.prompt for p in synthetic.make_problems(split, count, seed=seed)
            }
    assert not sides[True] & sides[False]


def test_train_and_test_are_one_distribution():
    """Catches a test side that is easier: the shares of families and levels must agree."""
    shares = []
    for split in ("train", "test"):
        problems = [synthetic.draw(split, i) for i in range(3000)]
        count = collections.Counter((p.meta["family"], p.meta["level"]) for p in problems)
        shares.append(np.array([count[key] / 3000 for key in sorted(count)]))
    assert len(shares[0]) == 15
    np.testing.assert_allclose(*shares, atol=0.02)


@pytest.mark.parametrize("split", synthetic.DISTRIBUTIONS)
def test_calculations_of_the_worked_solution_are_true(split):
    """Catches an operator, an operand or an order gone wrong, with Python as the judge."""
    for problem in synthetic.make_problems(split, 150, seed=1):
        lines = problem.solution.replace(" mod ", "mod")
        for a, op, b, value in CALCULATIONS.findall(lines):
            truth = eval(f"{a}{'%' if op == 'mod' else op}{b}")
            assert truth == int(value), problem
        assert problem.solution.endswith(f"\\boxed{{{problem.answer}}}.")


def answer_of(question):
    """Solves a question from its words alone, by other means than the program behind it."""
    n = [int(x) for x in re.findall(r"\d+", question)]
    if question.startswith("Start"):
        value = n[0]
        for verb, b in re.findall(r"(add|subtract|multiply by) (\d+)", question):
            value = {"add": value + int(b), "subtract": value - int(b)}.get(verb, value * int(b))
        return value
    if question.startswith(("Compute", "Find (")):
        return eval(question.removeprefix("Compute").removeprefix("Find").replace("mod", "%")[:-1])
    if question.startswith("Which"):
        return max(eval(x) for x in question.split(", ")[1].split("?")[0].split(" or "))
    if "reads" in question:
        return n[0] * n[1] + n[2]
    if "shares" in question:
        return (n[0] + n[1]) % n[2]
    if "boxes" in question:
        return n[0] + n[1] * n[2] - n[3]
    if question.startswith("What is"):
        return eval(question[8:-1].replace("plus", "+").replace("minus", "-"))
    if "more. How many" in question:
        return n[0] + n[1]
    if "away. How many" in question:
        return n[0] - n[1]
    if question.startswith("What day"):
        days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
        later = eval(question.split()[3])
        return days[(days.index(question.split()[-1][:-1]) + later) % 7]
    if "sequence" in question:
        return n[0] + (n[1] - n[0]) * (n[2] - 1)
    assert question.startswith("A number plus")
    return n[2] + n[1] - n[0]


@pytest.mark.parametrize("split", synthetic.DISTRIBUTIONS)
def test_the_answer_is_that_of_the_question_asked(split):
    """Catches a question whose words say something else than the program behind it does."""
    for problem in synthetic.make_problems(split, 200, seed=9):
        question = problem.prompt.partition("\n")[0]
        assert str(answer_of(question)) == problem.answer, problem


def test_the_verifier_accepts_the_solutions_words_included():
    """Catches answers that the reward cannot read: weekdays in a box, zero, large numbers."""
    for split in synthetic.DISTRIBUTIONS:
        for problem in synthetic.make_problems(split, 25, seed=5):
            assert verify(problem.solution, problem.answer).correct, problem
            assert not verify(problem.solution, problem.answer + "1").correct, problem


def test_out_of_distribution_sets_are_what_they_say():
    train = synthetic.make_problems("train", 300)
    longest = max(len(p.meta["steps"]) for p in train)
    families = {p.meta["family"] for p in train}
    steps = synthetic.make_problems("ood_steps", 100)
    assert np.mean([len(p.meta["steps"]) for p in steps]) > longest
    second = lambda p: max(b for _, _, b in p.meta["steps"] if isinstance(b, int))
    assert max(second(p) for p in train if p.meta["family"] != "comparison") < 10
    large = synthetic.make_problems("ood_large", 100)
    assert np.mean([second(p) > 9 for p in large if p.meta["family"] != "comparison"]) > 0.8
    unseen = {p.meta["family"] for p in synthetic.make_problems("ood_family", 100)}
    assert not unseen & families


def test_an_unknown_split_or_level_is_refused_by_name():
    with pytest.raises(ValueError, match="'dev'.*train, test"):
        synthetic.draw("dev", 0)
    with pytest.raises(ValueError, match="level 9.*train"):
        synthetic.draw("train", 0, level=9)


def test_asking_for_more_problems_than_there_are_ends_with_a_sentence(monkeypatch):
    """Catches an endless loop: the smallest family would be drawn for ever."""
    monkeypatch.setattr(synthetic, "GIVE_UP", 50)
    days = synthetic.Distribution(("sequence",), (1,), operand=3)
    monkeypatch.setitem(synthetic.DISTRIBUTIONS, "ood_family", days)
    with pytest.raises(ValueError, match="'ood_family' has only about"):
        synthetic.make_problems("ood_family", 5000)


# ------------------------------------------------------------------------------------- reasoner


def test_careful_ways_arrive_at_the_right_value():
    """Catches a wrong check, with which the epistemic words would lower accuracy."""
    for op in ("+", "-", "*", "mod"):
        for a in range(0, 300, 7):
            for b in range(2, 10) if op in ("*", "mod") else range(2, 300, 11):
                for part in reasoner.careful_parts(op, a, b):
                    left, value = part.split("=")
                    assert eval(left) == int(value), part
    assert reasoner.careful_parts("+", 47, 38) == ["7+8=15", "4+3+1=8"]
    assert reasoner.careful_parts("-", 583, 264) == ["583-200=383", "383-60=323", "323-4=319"]
    assert reasoner.careful_parts("*", 47, 3) == ["40*3=120", "7*3=21"]
    assert reasoner.careful_parts("mod", 85, 7) == ["7*12=84", "85-84=1"]


def _accuracy(problems, temper, seed=0):
    rng = random.Random(seed)
    traces = [reasoner.work(p.meta["steps"], rng, temper) for p in problems]
    return np.mean([str(t.value) == p.answer for t, p in zip(traces, problems, strict=True)])


def test_noise_leaves_headroom_and_a_shown_solution_removes_it():
    problems = synthetic.make_problems("train", 1500)
    assert 0.5 < _accuracy(problems, reasoner.NOISY) < 0.7
    assert _accuracy(problems, reasoner.SURE) > 0.97


def test_checking_raises_accuracy_and_hedges_mark_doubt():
    """The construction that docs/tiny.md describes: without second looks accuracy falls."""
    problems = synthetic.make_problems("train", 1500)
    blind = dataclasses.replace(reasoner.NOISY, notice=0.0, notice_hedged=0.0)
    assert _accuracy(problems, reasoner.NOISY) > _accuracy(problems, blind) + 0.05
    rng = random.Random(1)
    slips = {True: [], False: []}
    for problem in problems:
        values = []
        for op, a, b in problem.meta["steps"]:
            a, b = synthetic.resolve(a, values), synthetic.resolve(b, values)
            values.append(synthetic.apply_op(op, a, b))
            line, value, _ = reasoner._work_step(rng, blind, op, a, b, True)
            slips[sum(epistemic.count(line).values()) > 0].append(value != values[-1])
    assert np.mean(slips[True]) > np.mean(slips[False]) + 0.04


def test_examples_are_pure_and_privileged_ones_are_sure():
    examples = [reasoner.make_example(i, seed=2) for i in range(600)]
    assert examples[100:103] == [reasoner.make_example(i, seed=2) for i in (100, 101, 102)]
    words = collections.defaultdict(list)
    for example in examples:
        words[example.kind].append(sum(epistemic.count(example.response).values()))
    assert set(words) == set(reasoner.MIXTURE)
    assert np.mean(words["guided"]) < 0.2 * np.mean(words["think"])
    assert np.mean(words["guided_uncertain"]) > np.mean(words["think"])


# ------------------------------------------------------------------------------------ tokenizer


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = chat.encode_text(tokenizer, text)
    assert chat.decode(tokenizer, ids, skip_special_tokens=False) == text


def test_epistemic_words_and_phrases_are_single_tokens(tokenizer):
    for word in tiny_tokenizer.EPISTEMIC:
        for form in (word, " " + word, word.capitalize()):
            assert len(chat.encode_text(tokenizer, form)) == 1, form
    for phrase in tiny_tokenizer.PHRASES:
        assert len(chat.encode_text(tokenizer, phrase)) == 1, phrase
    assert set(tiny_tokenizer.EPISTEMIC) == set(epistemic.WORDS)
    assert len(chat.encode_text(tokenizer, "1234567890")) == 10


def test_no_word_of_the_pretraining_texts_is_spelled_in_bytes(tokenizer):
    """Catches a new phrase in the problems that would cost many tokens without anybody noticing."""
    for i in range(400):
        example = reasoner.make_example(i)
        ids = np.concatenate(
            [chat.encode_text(tokenizer, t) for t in (example.prompt, example.response)]
        )
        letters = [chat.decode(tokenizer, [t]) for t in ids if t < 256]
        assert not [x for x in letters if x.isalpha() and x != "A"], example


def test_the_template_is_qwen3s(tokenizer):
    """Thinking off is a closed empty think block; old assistant turns lose their thinking."""
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render_prompt(tokenizer, "hi", enable_thinking=True) == head
    assert chat.render_prompt(tokenizer, "hi", enable_thinking=False) == (
        head + "<think>\n\n</think>\n\n"
    )
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nyes"},
        {"role": "user", "content": "so?"},
    ]
    assert "hmm" not in chat.render_prompt(tokenizer, turns) and "yes" in chat.render_prompt(
        tokenizer, turns
    )
