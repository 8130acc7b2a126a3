"""The epistemic counts equal the reference script's."""

import json
import math

import pytest

from sdjax.analysis import epistemic


def test_counts_equal_the_reference_exactly(shared_dir):
    """Catches word boundaries, a missing lower() and overlapping counts."""
    cases = json.loads((shared_dir / "fixtures" / "text_epistemic_counts.json").read_text())
    for case in cases:
        counts = epistemic.count(case["input"])
        assert counts == case["counts"]
        assert epistemic.total(counts) == case["total"]


def test_substrings_count_and_whole_words_do_not():
    text = "Unlikely mighty checked AWAIT; wait. Maybe_not seems-likely"
    assert epistemic.total(epistemic.count(text)) == 8
    bounded = epistemic.count_bounded(text)
    assert bounded["wait"] == 1 and bounded["likely"] == 1 and bounded["seems"] == 1
    assert epistemic.total(bounded) == 3


def test_summary_weighs_the_rate_by_tokens():
    """Catches a mean of per-response rates in place of words over tokens."""
    out = epistemic.summary(["wait wait", "x"], [10, 90])
    assert out["per_response"] == 1.0 and out["wait"] == 1.0 and out["hmm"] == 0.0
    assert out["per_1k_tokens"] == pytest.approx(20.0)


def test_empty_input_is_nan_and_a_mismatch_an_error():
    assert math.isnan(epistemic.summary([], [])["per_response"])
    assert math.isnan(epistemic.per_1000_tokens(3, 0))
    with pytest.raises(ValueError, match="1 texts but 2 lengths"):
        epistemic.summary(["a"], [1, 2])
