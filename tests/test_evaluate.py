"""Scores by hand, and that samples do not depend on what else is evaluated."""

import itertools
import json
import math
import types
from concurrent.futures import Future

import numpy as np
import pytest
from etils import epath

from sdjax import build, config, evaluate
from sdjax.metrics import read_rows
from sdjax.records import Completion, Problem, SamplingParams, Verdict

VOCAB = ["wait", "unlikely", "1", "2", "</s>"]


class FakeTokenizer:
    def decode(self, ids, **kwargs):
        return " ".join(VOCAB[i] for i in ids)


class FakeStyle:
    tokenizer = FakeTokenizer()

    def encode(self, problem):
        return np.arange(3, dtype=np.int32)


class FakeEngine:
    """Tokens are a function of (seed, request id, index), as the real engine promises."""

    def __init__(self, drop=()):
        self.drop, self.requests = drop, []

    def prepare(self, params):
        return params

    def generate(self, params, requests, on_finish=None, on_tokens=None):
        self.requests += requests
        out = []
        for request in requests:
            if request.id & 0xFFFFF in self.drop:
                continue
            for index in range(request.n):
                rng = np.random.default_rng([request.sampling.seed, request.id, index])
                tokens = rng.integers(0, 4, size=rng.integers(1, 6)).astype(np.int32)
                zeros = np.zeros(len(tokens), np.float32)
                reason = "length" if len(tokens) == 5 else "eos"
                out.append(Completion(request.id, index, tokens, zeros, zeros, reason))
        for completion in reversed(out):
            on_finish(completion)
        return out


class FakePool:
    """A response is correct when its last word is the answer."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def submit(self, response, gold):
        future = Future()
        last = response.split()[-1]
        future.set_result(Verdict(last == gold, last, "ok"))
        return future

    def score(self, responses, golds):
        return [Verdict(gold != "unreadable", gold, "ok") for gold in golds]


def problems(name, n):
    return [Problem(f"{name}-{i}", "question", "1") for i in range(n)]


CFG = evaluate.EvalConfig(4, SamplingParams(0.6), pass_at=(1, 4), seed=3)


def run(sets, cfg=CFG, step=0, **kwargs):
    return evaluate.evaluate(
        FakeEngine(**kwargs), None, FakePool(), FakeStyle(), sets, cfg, step=step
    )


def test_metrics_agree_with_the_rows():
    result = run({"test": problems("a", 5)})
    rows, values = result.rows, {k.split("/", 2)[2]: v for k, v in result.metrics.items()}
    assert len(rows) == 20 and {row["set"] for row in rows} == {"test"}
    assert values["avg@4"] == pytest.approx(np.mean([row["correct"] for row in rows]))
    by_problem = {
        key: list(group) for key, group in itertools.groupby(rows, lambda r: r["problem"])
    }
    any_right = [any(row["correct"] for row in group) for group in by_problem.values()]
    assert values["pass@4"] == pytest.approx(np.mean(any_right))
    assert values["pass@1"] == pytest.approx(values["avg@4"])
    assert values["response_len_mean"] == pytest.approx(np.mean([row["length"] for row in rows]))
    assert values["truncated_frac"] == pytest.approx(np.mean([row["truncated"] for row in rows]))
    waits = sum(row["response"].count("wait") for row in rows)
    unlikely = sum(row["response"].count("unlikely") for row in rows)
    assert waits > 0 and unlikely > 0
    assert values["epistemic_per_response"] == pytest.approx((waits + unlikely) / 20)
    assert values["epistemic_bounded_per_response"] == pytest.approx(waits / 20)
    tokens = sum(row["length"] for row in rows)
    assert values["epistemic_per_1k_tokens"] == pytest.approx(1000 * (waits + unlikely) / tokens)
    assert values["word/likely"] == pytest.approx(unlikely / 20)


def test_samples_of_a_set_do_not_depend_on_the_other_sets():
    """Catches request ids numbered over all sets: adding a set would change every result."""
    alone = run({"ood": problems("b", 3)})
    both = run({"test": problems("a", 2), "ood": problems("b", 3)})
    assert [row for row in both.rows if row["set"] == "ood"] == alone.rows
    assert alone.metrics.items() <= both.metrics.items()


def test_seed_and_step_choose_the_samples():
    sets = {"test": problems("a", 4)}
    assert run(sets, step=7) == run(sets, step=7)
    assert run(sets, step=7).rows != run(sets, step=8).rows
    other = evaluate.EvalConfig(4, SamplingParams(0.6), pass_at=(4,), seed=4)
    assert run(sets, step=7).rows != run(sets, other, step=7).rows


def test_dropped_prompts_count_as_wrong_and_are_told():
    """Catches means over the problems that happened to fit."""
    result = run({"test": problems("a", 4)}, drop=(1, 2))
    values = result.metrics
    full = run({"test": problems("a", 4)})
    kept = [row["correct"] for row in full.rows if row["problem"] in ("a-0", "a-3")]
    assert values["eval/test/missing_frac"] == 0.5
    assert values["eval/test/avg@4"] == pytest.approx(sum(kept) / 16)
    lengths = [row["length"] for row in result.rows]
    assert values["eval/test/response_len_mean"] == pytest.approx(np.mean(lengths))


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="'test' has no problems"):
        run({"test": []})


def test_pass_at_k_equals_counting_all_subsets():
    """Catches the biased 1 - (1 - p)^k, and a wrong end of the product."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(draws, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            got = evaluate.pass_at_k(np.array([c]), n, k)[0]
            assert got == pytest.approx(expected, abs=1e-12), (n, c, k)
    with pytest.raises(ValueError, match="pass@3"):
        evaluate.pass_at_k(np.array([1]), 2, 3)


def test_graded_text_follows_the_first_closed_think_block():
    assert evaluate.after_think("<think>a</think>b<think>c</think>d") == "b<think>c</think>d"
    assert evaluate.after_think("a</think>b") == "a</think>b"
    assert evaluate.after_think("<think>never closed") == "<think>never closed"


def test_results_can_be_read_again(tmp_path):
    result = run({"test": problems("a", 1)})
    evaluate.write_results(result, CFG, "tiny", epath.Path(tmp_path))
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["eval"]["samples"] == 4 and facts["metrics"]["eval/test/stderr"] is None
    assert facts["metrics"]["eval/test/avg@4"] == result.metrics["eval/test/avg@4"]
    assert read_rows(tmp_path / "responses.jsonl") == result.rows
    assert (tmp_path / "table.md").read_text().startswith("`tiny`, 4 samples, temperature 0.6")


def test_one_problem_has_no_standard_error():
    values = run({"test": problems("a", 1)}).metrics
    assert math.isnan(values["eval/test/stderr"])


def eval_config(**fields):
    c = config.base()
    c.data.enable_thinking = fields.pop("enable_thinking", True)
    c.eval.update(fields)
    return evaluate.EvalConfig.from_config(c)


def test_paper_preset_follows_the_thinking_switch():
    on = eval_config(preset="paper", samples=2, max_new_tokens=7)
    assert (on.sampling.temperature, on.sampling.top_p) == (0.6, 0.95)
    assert (on.samples, on.pass_at, on.sampling.max_new_tokens) == (16, (16,), 38912)
    off = eval_config(preset="paper", enable_thinking=False)
    assert (off.sampling.temperature, off.sampling.top_p) == (0.7, 0.8)
    assert eval_config(preset="non_thinking").sampling.temperature == 0.7


@pytest.mark.parametrize("top_k", [0, 20])
def test_top_k_stays_a_switch_of_its_own(top_k):
    """The paper's table says 20, its script never passes it."""
    assert eval_config(preset="paper", top_k=top_k).sampling.top_k == top_k


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="config.eval.preset"):
        eval_config(preset="papre")
    with pytest.raises(ValueError, match="config.eval.samples = 2"):
        eval_config(samples=2, pass_at=(1, 4))


def small_evaluation():
    c = config.base()
    config.shrink(c)
    c.mode, c.eval.sets, c.eval.problems, c.eval.samples = "evaluate", ("test",), 2, 2
    c.eval.max_new_tokens = c.sampling.max_new_tokens = 8
    return c


def check_files(folder):
    rows = read_rows(folder / "responses.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 0, 1]
    assert all(0 < row["length"] <= 8 for row in rows)
    assert "| test | " in (folder / "table.md").read_text()
    assert json.loads((folder / "results.json").read_text())["model"] == "tiny"


def test_mode_evaluate_leaves_numbers_table_and_responses(tmp_path, monkeypatch, caplog):
    """And names the golds that no response can meet."""
    c = small_evaluation()
    parts = types.SimpleNamespace(
        engine=FakeEngine(),
        pool=FakePool(),
        style=FakeStyle(),
        eval_sets={"test": [*problems("a", 1), Problem("a-1", "question", "unreadable")]},
        eval_cfg=evaluate.EvalConfig.from_config(c),
    )
    monkeypatch.setattr(build, "sampler", lambda c, mesh: (parts, None))
    evaluate.run(c, str(tmp_path))
    check_files(tmp_path / "eval")
    assert "1 of 2 golds of evaluation set test fail" in caplog.text


@pytest.mark.slow
def test_mode_evaluate_with_the_tiny_model(tmp_path):
    evaluate.run(small_evaluation(), str(tmp_path))
    check_files(tmp_path / "eval")
