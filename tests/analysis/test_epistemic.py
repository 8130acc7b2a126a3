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


def test_words_per_1000_tokens():
    assert epistemic.per_1000_tokens(2, 100) == pytest.approx(20.0)
    assert math.isnan(epistemic.per_1000_tokens(3, 0))
