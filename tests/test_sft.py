"""Supervised training: rows, loss, and a small run from a file to an exported model."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax import config, parallel, sft
from sdjax.data import chat, hub, reasoner, supervised, tiny_tokenizer
from sdjax.metrics import read_metrics
from sdjax.models import decoder, from_pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROW_LEN = 96


class StopAfter:
    """Asks the run to stop once it was asked `steps` times, as a signal would."""

    def __init__(self, steps):
        self.left = steps

    def agreed(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer.load()


def small_config(tmp_path, **fields):
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"Compute {i}+2.", "response": f"The answer is \\boxed{{{i + 2}}}."}
        for i in range(5)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    c = config.base()
    c.mode = "sft"
    c.model.remat = "none"
    c.sft.update({"init": "scratch", "source": "jsonl", "path": str(path), "steps": 4})
    c.sft.update({"examples": 8, "rows": 8, "row_len": ROW_LEN})
    c.sft.arch.update({"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1})
    c.sft.arch.update({"head_dim": 16, "d_ff": 64})
    c.optimizer.update({"lr": 1e-2, "warmup_steps": 1})
    c.checkpoint.every = 2
    for name, value in fields.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


EXAMPLE = st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=2, max_size=30)


@settings(max_examples=100, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=12), st.integers(1, 5))
def test_every_learnt_token_is_in_one_slot_after_its_own_past(examples, rows):
    """Catches a slot that points at the wrong place or into a neighbour, and silent loss."""
    coded = [(np.array([t for t, _ in e]), np.array([k for _, k in e])) for e in examples]
    packed = supervised.pack(coded, rows, row_len=40, slots=40)
    expected = sorted(
        (tuple(tokens[: i + 1]), tokens[i + 1])
        for tokens, learn in coded
        for i in range(len(tokens) - 1)
        if learn[i + 1]
    )
    found = []
    for b, k in zip(*np.nonzero(packed.mask), strict=True):
        at = packed.index[b, k]
        start = at - packed.positions[b, at]
        assert len(set(packed.segment_ids[b, start : at + 1])) == 1
        found.append((tuple(packed.tokens[b, start : at + 1]), packed.targets[b, k]))
    if packed.dropped == 0:
        assert sorted(found) == expected
    else:
        assert set(found) <= set(expected) and len(found) < len(expected) + packed.dropped
    if rows >= len(examples):
        assert packed.dropped == 0


def test_cross_entropy_by_chunks_is_the_plain_one():
    """Value and both gradients, with a chunk that does not divide the slots."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 7, 8))
    weight = jax.random.normal(keys[1], (11, 8))
    targets = jax.random.randint(keys[2], (2, 7), 0, 11)

    def plain(hidden, weight):
        logp = jax.nn.log_softmax(hidden @ weight.T)
        return -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

    chunked = lambda h, w: sft.cross_entropy(h, w, targets, 3)[0]
    np.testing.assert_allclose(chunked(hidden, weight), plain(hidden, weight), rtol=1e-5)
    for one, two in zip(
        jax.jit(jax.grad(lambda h, w: (chunked(h, w) ** 2).sum(), (0, 1)))(hidden, weight),
        jax.jit(jax.grad(lambda h, w: (plain(h, w) ** 2).sum(), (0, 1)))(hidden, weight),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_responses_however_they_are_packed(tmp_path, tokenizer):
    """Catches attention across examples, prompts that carry loss, and a mean over padding."""
    c = small_config(tmp_path)
    cfg, _, state = sft.build(c, parallel.single_device_mesh())
    spans = [("Compute 2+3.", False), ("The answer is 5", True)], [("8*9=", False), ("72", True)]
    examples = [supervised.encode(tokenizer, list(s)) for s in spans]
    together = supervised.pack(examples, 1, ROW_LEN, ROW_LEN)
    value, metrics = jax.jit(sft.make_loss(cfg, c))(state.params, together.arrays())

    nll = []
    for tokens, learn in examples:
        ids = jnp.asarray(tokens)[None]
        ones, places = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
        hidden = jax.jit(decoder.hidden_states, static_argnums=4)(
            state.params, ids, ones, places, cfg
        )
        logp = jax.nn.log_softmax(decoder.logits(state.params, hidden, cfg))[0, :-1]
        nll += [-logp[i, tokens[i + 1]] for i in range(len(tokens) - 1) if learn[i + 1]]
    assert int(metrics["sft/tokens"]) == len(nll)
    np.testing.assert_allclose(value, np.mean(nll), rtol=1e-5)


def test_a_run_learns_resumes_exactly_and_exports(tmp_path):
    """Killed at step 2 equals never killed; the export is the model that was trained."""
    c = small_config(tmp_path, sft__steps=12, checkpoint__every=50)
    folder = sft.run(c, str(tmp_path / "whole"))
    assert sft.run(c, str(tmp_path / "cut"), StopAfter(3)) is None
    again = sft.run(c, str(tmp_path / "cut"))
    losses = [
        [row["loss/total"] for row in read_metrics(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert losses[0][-1] < 0.7 * losses[0][0]
    one, two = from_pretrained(str(folder)), from_pretrained(str(again))
    ids = chat.encode_prompt(one.tokenizer, "Compute 1+2.", enable_thinking=True)[None]
    np.testing.assert_array_equal(one.logits(ids), two.logits(ids))
    assert one.generation["eos_token_id"] == [one.tokenizer.eos_token_id]


def test_a_step_asks_for_the_same_examples_every_time(tmp_path, tokenizer):
    """Catches a source with a hidden position: resuming would see other data. Epochs differ."""
    c = small_config(tmp_path)
    read = supervised.source(c, tokenizer)
    first = supervised.batch(read, tokenizer, c.sft, 3)
    again = supervised.batch(supervised.source(c, tokenizer), tokenizer, c.sft, 3)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    epochs = [[read(5 * epoch + i)[0] for i in range(5)] for epoch in range(4)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert any(e != epochs[0] for e in epochs)


def test_drills_fade_out_and_hold_only_true_facts(tmp_path, tokenizer):
    c = small_config(tmp_path, sft__source="reasoner", sft__steps=100)
    read = supervised.source(c, tokenizer)
    drills = [len(read(i)) > 2 for i in range(800)]
    assert np.mean(drills[:100]) > 0.7 and not any(drills[400:])
    for index in range(60):
        for (question, learn), (answer, learnt) in zip(
            *[iter(reasoner.make_drill(index))] * 2, strict=True
        ):
            assert learnt and not learn
            if question[0].isdigit():
                truth = eval(question.rstrip("=").replace(" mod ", "%"))
                assert int(answer.split()[0]) == truth == int(answer.split()[-1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sft__path": "/nowhere.jsonl"}, "config.sft.path is '/nowhere.jsonl'"),
        ({"sft__source": "web"}, "config.sft.source is 'web'"),
        ({"model__lora__rank": 4}, "config.model.lora.rank is 4"),
    ],
)
def test_a_mistake_in_the_config_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        sft.run(small_config(tmp_path, **fields), str(tmp_path / "run"))


def test_a_bad_line_of_the_file_is_named(tmp_path, tokenizer):
    c = small_config(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="data.jsonl, line 2"):
        supervised.source(c, tokenizer)


def test_the_shipped_model_is_the_recipes_and_was_trained(tmp_path):
    """Catches weights or a tokenizer left behind when the recipe or the traces change."""
    folder = pathlib.Path(hub.resolve("tiny"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 6e6
    tiny_tokenizer.save(tmp_path)
    built, shipped = (json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path, folder))
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens"):
        assert built[part] == shipped[part]
    recipe = runpy.run_path(str(ROOT / "configs" / "tiny_pretrain.py"))["get_config"]()
    model = from_pretrained("tiny")
    fresh = sft.scratch_config(recipe.sft.arch, model.tokenizer)
    assert model.cfg == fresh
    recipe.sft.update({"examples": 40, "rows": 16, "steps": 1, "drill_start": 0.0})
    read = supervised.source(recipe, model.tokenizer)
    rows = supervised.batch(read, model.tokenizer, recipe.sft, step=100_000)
    loss, metrics = jax.jit(sft.make_loss(model.cfg, recipe))(model.params, rows.arrays())
    assert rows.dropped == 0 and loss < 0.4 and metrics["sft/accuracy"] > 0.85
