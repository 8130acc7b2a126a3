"""Logits and greedy continuations against `transformers` on PyTorch, in float32, for every family.

The logits went red when the q/k norm was dropped or taken over the wrong axes, the rope halves
swapped, the window ignored or off by one, query heads regrouped, biases or YaRN's factor dropped.
"""

import dataclasses

import families
import jax
import numpy as np
import pytest

import sdjax.models
from sdjax.data import chat
from sdjax.models import hf

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install 'sdjax[parity]'")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices are slower on many threads, and the suite shares its cores."""
    torch.set_num_threads(1)


def open_in_torch(folder):
    """The folder as transformers reads it; every weight must be found."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def torch_logits(model, tokens, mask):
    """float32 logits with positions counted over the real tokens."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.as_tensor(tokens, dtype=torch.long),
            attention_mask=torch.as_tensor(mask),
            position_ids=torch.as_tensor(positions),
        ).logits.numpy()


def max_difference(ours, theirs, mask):
    return np.abs(np.asarray(ours) - theirs)[mask > 0].max()


@pytest.mark.parametrize("name", families.CASES)
def test_logits_match_transformers(tmp_path, name):
    """Full, right-padded and left-padded rows agree; transformers reads the export alike."""
    families.write_checkpoint(tmp_path / "a", families.CASES[name])
    theirs_model = open_in_torch(tmp_path / "a")
    model = sdjax.models.from_pretrained(tmp_path / "a")
    tokens, mask = families.token_batch(model.cfg.vocab_size)
    theirs = torch_logits(theirs_model, tokens, mask)
    assert np.abs(theirs).max() > 1, "logits too small for the tolerance to mean anything"
    assert max_difference(model.logits(tokens, mask), theirs, mask) < TOLERANCE

    hf.save(tmp_path / "b", model.cfg, model.params, dtype="float32")
    exported = torch_logits(open_in_torch(tmp_path / "b"), tokens, mask)
    assert max_difference(exported, theirs, mask) < 1e-5


@pytest.mark.parametrize("name", families.CASES)
def test_greedy_continuation_matches(tmp_path, name):
    """64 greedy tokens, sampled there with a cache; ours must choose each of them in one forward.

    By induction that is the same as sampling here.
    """
    families.write_checkpoint(tmp_path, families.CASES[name])
    prompt = np.arange(3, 15)[None]
    out = (
        open_in_torch(tmp_path)
        .generate(
            torch.as_tensor(prompt),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=None,
            use_cache=True,
        )
        .numpy()
    )
    logits = np.asarray(sdjax.models.from_pretrained(tmp_path).logits(out[:, :-1]))
    assert out.shape == (1, 76)
    np.testing.assert_array_equal(logits[0, 11:].argmax(-1), out[0, 12:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exported_folder_needs_nothing_of_ours(tmp_path, dtype):
    """Auto classes find model, tokenizer, template and end tokens; logits are those of the dtype.

    Several files with an index, as a large model is written.
    """
    model = sdjax.models.from_pretrained("tiny")
    ends = {"eos_token_id": [*model.cfg.eos_token_ids, 7], "temperature": 0.6, "do_sample": True}
    hf.save(
        tmp_path / "out", model.cfg, model.params, model.tokenizer, ends, dtype, shard_bytes=300_000
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == getattr(torch, dtype)
    assert opened.generation_config.eos_token_id == ends["eos_token_id"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = chat.encode_prompt(tokenizer, "What is 3 + 4?")
    np.testing.assert_array_equal(prompt, chat.encode_prompt(model.tokenizer, "What is 3 + 4?"))

    theirs = torch_logits(opened.float().eval(), prompt[None], np.ones((1, len(prompt))))
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), model.params)
    ours = dataclasses.replace(model, params=rounded).logits(prompt[None])
    assert np.abs(ours - theirs).max() < TOLERANCE


def test_smollm2_matches_transformers(smollm2_dir):
    """The real SmolLM2-135M-Instruct: logits of a chat prompt and 64 greedy tokens."""
    theirs_model = open_in_torch(smollm2_dir)
    model = sdjax.models.from_pretrained(smollm2_dir)
    prompt = chat.encode_prompt(model.tokenizer, families.SMOLLM2_PROMPT)[None]
    out = theirs_model.generate(
        torch.as_tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),  # else <|im_end|> is masked
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
    ).numpy()
    ours = np.asarray(model.logits(out[:, :-1]))
    theirs = torch_logits(theirs_model, out[:, :-1], np.ones_like(out[:, :-1]))
    assert np.abs(ours - theirs).max() < TOLERANCE
    first = prompt.shape[1] - 1
    np.testing.assert_array_equal(ours[0, first:].argmax(-1), out[0, first + 1 :])
