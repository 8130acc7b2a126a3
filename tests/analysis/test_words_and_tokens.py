"""Word shift, per-token divergence and the judge's replies, by hand."""

import json

import numpy as np
import pytest
from etils import epath

from sdjax.analysis import judge, token_kl, token_study, word_shift
from sdjax.metrics import read_rows


def test_word_shift_is_the_change_in_occurrences_per_response():
    """Catches totals in place of means per response: the two sides differ in size."""
    base = ["Wait, the sum is 5. wait!", "the sum"]
    model = ["the the sum is", "The sum", "the sum", "maybe"]
    shift = word_shift.word_shift(base, model)
    delta = dict(zip(shift.words, shift.delta, strict=True))
    assert delta == {"wait": -1.0, "the": 0.0, "sum": -0.25, "is": -0.25}
    assert shift.epistemic.tolist() == [word == "wait" for word in shift.words]


def test_words_are_runs_of_letters():
    assert word_shift.words_of("Don't re-check x2y\\boxed{Wait}") == [
        "don",
        "t",
        "re",
        "check",
        "x",
        "y",
        "boxed",
        "wait",
    ]


def test_rare_words_and_missing_responses():
    shift = word_shift.word_shift(["a a b"], ["b"], min_count=2)
    assert shift.words == ("a",)
    with pytest.raises(ValueError, match="0 base"):
        word_shift.word_shift([], ["a"])


def test_word_shift_table():
    base = ["wait the sum", "wait maybe the sum"]
    text = word_shift.table({"sdpo": word_shift.word_shift(base, ["the sum"])})
    assert "| wait                     | 1.000 | 0.000 |" in text
    assert "| sdpo  |          2 | -0.7500 ± 0.3536 |   -1.000 | 0.0000 ± 0.0000 |" in text
    assert "Largest shifts of sdpo: wait -1.00, maybe -0.50" in text


def test_token_rows_average_by_surface_form():
    """Catches forms merged over leading spaces, and a mean over forms in place of tokens."""
    tokens = [" wait", " wait", "wait", "a", "a", "a"]
    rows = token_kl.by_token([0.4, 0.6, 0.2, 0.0, 0.0, 0.0], tokens, min_count=2)
    assert [(row.token, row.count) for row in rows] == [(" wait", 2), ("a", 3)]
    assert rows[0].mean == pytest.approx(0.5) and rows[0].ratio == pytest.approx(2.5)
    assert [row.token for row in token_kl.epistemic_rows(rows)] == [" wait"]
    assert "2.5x" in token_kl.table(rows)


def test_bad_divergences_are_refused():
    with pytest.raises(ValueError, match="2 tokens"):
        token_kl.by_token([0.1], ["a", "b"])
    with pytest.raises(ValueError, match="1 divergences are not finite"):
        token_kl.by_token([0.1, np.nan], ["a", "b"])


def test_coloured_text_escapes_html_and_keeps_the_text():
    text = token_kl.coloured_html(["<think>", "\n", " wait"], [0.0, 0.5, 2.0], top=1.0)
    assert "&lt;think&gt;" in text and "<think>" not in text and "↵<br>" in text
    assert 'title="2.0000" style="background: rgba(230, 159, 0, 1.00)"> wait' in text


def test_token_study_files(tmp_path):
    row = {"problem": "<p>", "index": 0, "correct": True, "context": "demonstration"}
    rows = [row | {"tokens": [" wait", "\n"], "divergence": [0.3, 0.1]}]
    path = token_study._write(epath.Path(tmp_path), rows, 4, min_tokens=1)
    assert "2 tokens of 1 responses (4 sampled" in path.read_text()
    assert "`' wait'` |     1 |                 0.3000 |" in path.read_text()
    assert read_rows(tmp_path / "token_kl.jsonl") == rows
    assert "<p>&lt;p&gt;, response 0, right</p>" in (tmp_path / "token_kl.html").read_text()


@pytest.mark.parametrize(
    "reply",
    [
        '{"count": 3, "examples": ["hmm", "not sure"]}',
        '```json\n{"count": 3, "examples": ["hmm", "not sure"]}\n```',
        'Here {is} it: {"count": 3, "examples": ["hmm", "not sure"]} as asked',
    ],
)
def test_judge_replies_are_found_in_their_wrapping(reply):
    assert judge.parse_reply(reply) == judge.Judgement(3, ("hmm", "not sure"))


@pytest.mark.parametrize("reply", ["", "3", '{"count": "3"}', '{"count": true}', '{"count": -1}'])
def test_replies_without_a_count_are_errors(reply):
    with pytest.raises(ValueError, match="no JSON object with a count"):
        judge.parse_reply(reply)


def test_judge_files(tmp_path):
    judge.write_prompts(["wait {x}", "fine"], tmp_path / "prompts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1] and "wait {x}" in rows[0]["prompt"]
    assert '{"count": <integer>' in rows[0]["prompt"]
    replies = [{"id": 0, "reply": '{"count": 1}'}, {"id": 1, "reply": "I cannot"}]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in replies))
    judgements, problems = judge.read_replies(tmp_path / "replies.jsonl")
    assert judgements == {0: judge.Judgement(1, ())} and problems[0].startswith("id 1")
