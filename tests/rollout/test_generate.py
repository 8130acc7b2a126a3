"""Sampling for people: the notebook's two lines and mode='generate'."""

import dataclasses
import io

import numpy as np
import pytest

import sdjax.models
import sdjax.rollout
from sdjax import config
from sdjax.data import chat
from sdjax.rollout import generate


@pytest.fixture(scope="module")
def model():
    return sdjax.models.from_pretrained("tiny")


def test_streamed_text_is_the_text_that_is_returned(model):
    """Catches pieces lost or printed twice, and characters cut in the middle."""
    out = io.StringIO()
    prompts = "What is 3 + 4?"
    texts = sdjax.rollout.sample(model, prompts, max_new_tokens=16, stream=True, out=out)
    assert out.getvalue() == "".join(text + "\n" for text in texts)
    again = sdjax.rollout.sample(model, prompts, max_new_tokens=16)
    assert texts == again != sdjax.rollout.sample(model, prompts, max_new_tokens=16, seed=1)


def test_incomplete_characters_wait_for_the_rest():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    out = io.StringIO()
    stream = generate.Stream(Bytes(), out)
    for piece in ([72, 0xE2], [0x82], [0xAC, 33]):
        stream(0, 0, np.array(piece))
        stream(1, 0, np.array([97]))  # the second prompt's response waits for the first's end
        stream(0, 1, np.array([98]))  # other responses to the same prompt are not shown
    assert out.getvalue() == "H€!"
    stream.close()
    assert out.getvalue() == "H€!\naaa\n"


def test_generate_mode_answers_the_config_or_the_terminal(model):
    c = config.get_config()
    c.model.path, c.mode, c.sampling.max_new_tokens = "tiny", "generate", 16
    c.generate.prompt = "What is 3 + 4?"
    out = io.StringIO()
    generate.run(c, "unused", out=out)
    expected = sdjax.rollout.sample(model, c.generate.prompt, max_new_tokens=16, seed=c.seed)
    assert out.getvalue() == expected[0] + "\n"
    c.generate.prompt = ""
    lines = iter(["What is 3 + 4?", "What is 3 + 4?", ""])
    typed = io.StringIO()
    generate.run(c, "unused", read=lambda: next(lines), out=typed)
    assert typed.getvalue().startswith(out.getvalue())
    assert typed.getvalue() != 2 * out.getvalue()  # the second turn has its own randomness


def test_a_model_without_tokenizer_is_told_so(model):
    with pytest.raises(ValueError, match="has no tokenizer"):
        sdjax.rollout.sample(dataclasses.replace(model, tokenizer=None), "x")


def test_ends_of_the_tiny_model_are_known(model):
    assert chat.end_token_ids(model.tokenizer, model.generation)
