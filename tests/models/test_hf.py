"""Checkpoints in and out: sharded reads, names of what is wrong, buckets, atomic exports."""

import json
import os
import pathlib

import families
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import sdjax.models
from sdjax.data import hub
from sdjax.models import hf
from sdjax.models.safetensors_io import SafetensorsFile
from sdjax.parallel import make_mesh

NAME = "llama-llama3-gqa7"
CASE = families.CASES[NAME] | {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path):
    families.write_checkpoint(tmp_path / "model", CASE | {"hidden_size": 48})
    return tmp_path / "model"


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_sharded_load_reads_each_shard_once(folder, monkeypatch):
    """The same values as on one device, and no process reads the rows that others own."""
    cfg, whole = hf.load(folder)
    read = []
    read_rows = SafetensorsFile.read_rows

    def counted(self, name, start, out):
        read_rows(self, name, start, out)
        read.append((name, out.nbytes))

    monkeypatch.setattr(SafetensorsFile, "read_rows", counted)
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
    _, split = hf.load(folder, mesh)
    assert_same(whole, split)
    assert split["layers"]["w_q"].sharding.spec == P(None, "fsdp", "tensor", None)
    w_q = [n for name, n in read if name == "model.layers.0.self_attn.q_proj.weight"]
    assert len(w_q) == 2 and sum(w_q) == whole["layers"]["w_q"][0].nbytes

    read.clear()
    hf.load(folder, make_mesh(data=8))
    assert len([1 for name, _ in read if name == "model.norm.weight"]) == 1


def test_rows_that_lie_apart_and_short_reads(tmp_path, monkeypatch):
    """Rows of a multiple of 1024 bytes are padded when read; a system call may return early."""
    folder = tmp_path / "model"
    families.write_checkpoint(folder, CASE | {"hidden_size": 256})
    stored = load_file(folder / "model.safetensors")
    _, whole = hf.load(folder)
    up = stored["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(whole["layers"]["w_up"][0], up.T)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, b[:3], at))
    assert_same(whole, hf.load(folder)[1])
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real(fd, [b[0][:999]], at))
    assert_same(whole, hf.load(folder)[1])


def test_wrong_tensors_are_listed_by_name(folder):
    """All of them in one message, so that a wrong checkpoint is understood at once."""
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected: extra.weight;" in message and "inv_freq" not in message
    assert "model.norm.weight is (3,), should be (48,)" in message


def test_what_is_not_safetensors_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model.safetensors: sdjax reads safetensors only"):
        hf.load(folder)
    (folder / "model.safetensors").write_bytes(b"not at all a header")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        hf.load(folder)


def test_a_file_cut_short_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cut short"):
        hf.load(folder)


def test_quantised_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(48, np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight .* stored as I8"):
        hf.load(folder)


def test_export_in_many_files_reads_back(folder, tmp_path):
    """Sharded by size with an index, as transformers writes it; nothing else is left behind."""
    cfg, params = hf.load(folder)
    hf.save(tmp_path / "out", cfg, params, dtype="float32", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    cfg_again, again = hf.load(tmp_path / "out")
    assert cfg_again == cfg
    assert_same(params, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_export_rounds_once_and_replaces_an_older_one(folder, tmp_path):
    cfg, params = hf.load(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    hf.save(tmp_path / "out", cfg, params, generation_config={"eos_token_id": [2, 9]})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    model = sdjax.models.from_pretrained(tmp_path / "out", dtype=jnp.bfloat16)
    assert_same(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert model.generation["eos_token_id"] == [2, 9]


def test_a_failed_export_leaves_the_older_one(folder, tmp_path):
    """A half-written export must never stand where a whole one stood."""
    cfg, params = hf.load(folder)
    hf.save(tmp_path / "out", cfg, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    broken = {**params, "embed": params["embed"][:-1]}
    with pytest.raises(ValueError):
        hf.save(tmp_path / "out", cfg, broken)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_buckets_are_read_and_written(folder):
    """Any fsspec URL: here its in-memory file system stands for gs://."""
    url = "memory://bucket/model"
    cfg, params = hf.load(folder)
    hf.save(url, cfg, params, dtype="float32")
    assert fsspec.filesystem("memory").exists("/bucket/model/config.json")
    _, again = hf.load(url)
    assert_same(params, again)


def test_paths_that_lead_nowhere_are_explained(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not a folder: give a folder with config.json"):
        hub.resolve(str(tmp_path / "nothing"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nobody/no-such-model.*neither a folder"):
        hub.resolve("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        hf.load_config(str(tmp_path / "empty"))


def test_logits_on_a_mesh_and_with_segments(folder):
    """The two-line API: default segments and positions, packed rows, any mesh."""
    model = sdjax.models.from_pretrained(folder)
    tokens = np.arange(3, 27).reshape(2, 12)
    logits = model.logits(tokens)
    assert logits.shape == (2, 12, CASE["vocab_size"]) and logits.dtype == jnp.float32
    split = sdjax.models.from_pretrained(folder, make_mesh(data=2, fsdp=2, tensor=2))
    rows = np.concatenate([tokens, tokens])
    np.testing.assert_allclose(np.asarray(split.logits(rows))[:2], logits, atol=1e-4)

    segments = np.array([[1] * 5 + [2] * 7] * 2)
    packed = model.logits(tokens, segments)
    np.testing.assert_allclose(packed[:, :5], logits[:, :5], atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], model.logits(tokens[:, 5:]), atol=1e-4)


def test_the_lines_for_notebooks_run():
    """The first code block of docs/models.md, as it stands there."""
    docs = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"
    code = docs.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["logits_BTV"].shape == (1, 3, names["model"].cfg.vocab_size)


def test_tied_checkpoints_may_repeat_the_head(tmp_path):
    """Some tied checkpoints store lm_head.weight too; transformers ignores it, and so do we."""
    raw = families.CASES["llama-tied"]
    tensors = families.write_checkpoint(tmp_path, raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, pathlib.Path(tmp_path) / "model.safetensors")
    _, params = hf.load(tmp_path)
    assert "head" not in params
