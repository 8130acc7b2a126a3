"""Logits against numbers that transformers and PyTorch computed once (make_golden.py)."""

import pathlib

import families
import numpy as np
import pytest

import sdjax.models
from sdjax.data import chat

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", families.CASES)
def test_logits_match_golden(tmp_path, name):
    """A changed norm, rope, window, bias or head order of any family shows here."""
    families.write_checkpoint(tmp_path, families.CASES[name])
    model = sdjax.models.from_pretrained(tmp_path)
    tokens, mask = families.token_batch(model.cfg.vocab_size)
    ours = families.sample_of(model.logits(tokens, mask))
    golden = np.load(GOLDEN / "families.npz")[name]
    real = mask[:, 3::6] > 0
    np.testing.assert_allclose(ours[real], golden[real], atol=2e-4, rtol=0)


def test_smollm2_matches_golden(smollm2_dir):
    """The real checkpoint: stored logits, and each of 64 greedy tokens is our choice too."""
    golden = np.load(GOLDEN / "smollm2.npz")
    model = sdjax.models.from_pretrained(smollm2_dir)
    tokens, prompt_len = golden["tokens"], int(golden["prompt_len"])
    prompt = chat.encode_prompt(model.tokenizer, families.SMOLLM2_PROMPT)
    np.testing.assert_array_equal(prompt, tokens[0, :prompt_len])
    logits = np.asarray(model.logits(tokens[:, :-1]))[0]
    np.testing.assert_allclose(logits[::8, ::251], golden["logits"], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(logits[prompt_len - 1 :].argmax(-1), tokens[0, prompt_len:])
