"""Checkpoints in and out: sharded reads, names of what is wrong, buckets, atomic exports."""

import collections
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import families
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import sdjax.models
from sdjax.data import hub
from sdjax.models import hf
from sdjax.models.leaf import bounds_of, read_shards
from sdjax.models.safetensors_io import SafetensorsFile, Scratch
from sdjax.parallel import make_mesh

NAME = "llama-llama3-gqa7"
CASE = families.CASES[NAME] | {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path):
    families.write_checkpoint(tmp_path / "model", CASE | {"hidden_size": 48})
    return tmp_path / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    families.write_checkpoint(folder, CASE | {"hidden_size": 48})
    return sdjax.models.from_pretrained(folder)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def bucket():
    """An empty bucket: fsspec's in-memory file system stands for gs://."""
    yield "memory://bucket/model"
    if fsspec.filesystem("memory").exists("/bucket"):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what is read of each tensor: name -> list of bytes."""
    read = collections.defaultdict(list)
    real = SafetensorsFile.read_rows

    def counted(self, name, start, out, column=0):
        real(self, name, start, out, column)
        read[name].append(out.nbytes)

    monkeypatch.setattr(SafetensorsFile, "read_rows", counted)
    return read


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]
)
def test_sharded_load_reads_everything_once(folder, bytes_read, sizes):
    """The same values as on one device, and devices that need the same rows share a reading."""
    _, whole = hf.load(folder)
    stored = {name: x.nbytes for name, x in load_file(folder / "model.safetensors").items()}
    bytes_read.clear()
    _, split = hf.load(
        folder, make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    )
    assert_same(whole, split)
    assert split["layers"]["w_q"].sharding.spec == P(None, "fsdp", "tensor", None)
    assert {name: sum(parts) for name, parts in bytes_read.items()} == stored


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_process_reads_only_its_slices(folder, bucket, bytes_read, where, axis):
    """Rows or columns: the second of two devices' part of every matrix is half of it."""
    cfg, whole = hf.load(folder)
    source = str(folder)
    if where == "bucket":
        hf.save(bucket, cfg, whole, dtype="float32")
        source = bucket
    mesh = make_mesh(**{axis: 2}, devices=jax.devices()[:2])
    _, split = hf.load(folder, mesh)
    files, halves = hf._open_files(source), 0
    bytes_read.clear()
    for leaf in hf.leaves(cfg):
        value = functools.reduce(lambda node, key: node[key], leaf.path, split)
        mine = value.addressable_shards[1]
        bounds = bounds_of(leaf.shape, mine.index)
        with ThreadPoolExecutor(2) as pool:
            parts = read_shards(leaf, [bounds], files, np.dtype(np.float32), pool, Scratch())
        np.testing.assert_array_equal(parts[bounds], np.asarray(mine.data))
        assert sum(sum(bytes_read[name]) for name in leaf.names) == mine.data.nbytes
        halves += mine.data.nbytes * 2 == value.nbytes
    assert halves >= 9  # all matrices, and the embedding and the head


def test_loading_takes_little_more_than_the_parameters(tmp_path):
    """Resident memory: what the process keeps, and buffers of the largest tensor's size."""
    raw = CASE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    tensors = families.write_checkpoint(tmp_path, raw | {"vocab_size": 8192, "head_dim": 64})
    sizes = [x.nbytes for x in tensors.values()]
    code = (
        "import re, sys, jax, sdjax.models.hf as hf\n"
        "jax.devices()\n"
        "text = lambda: open('/proc/self/status').read()\n"
        "status = lambda key: int(re.search(key + r':\\s*(\\d+)', text()).group(1))\n"
        "before = status('VmRSS')\n"
        "_, params = hf.load(sys.argv[1])\n"
        "print((status('VmHWM') - before) * 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sum(sizes) > 100e6 and sum(sizes) / 2 < grown < sum(sizes) + 2 * max(sizes)


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
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": null}')
    assert sdjax.models.from_pretrained(tmp_path / "out").generation["eos_token_id"] == [2]


def test_a_failed_export_leaves_the_older_one(folder, tmp_path):
    """A half-written export must never stand where a whole one stood."""
    cfg, params = hf.load(folder)
    hf.save(tmp_path / "out", cfg, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    broken = {**params, "embed": params["embed"][:-1]}
    with pytest.raises(ValueError):
        hf.save(tmp_path / "out", cfg, broken)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_buckets_are_read_and_written(folder, bucket):
    """Split over a mesh, too: of a bucket whole rows are fetched and cut here."""
    cfg, params = hf.load(folder)
    hf.save(bucket, cfg, params, dtype="float32")
    assert fsspec.filesystem("memory").exists("/bucket/model/config.json")
    assert_same(params, hf.load(bucket)[1])
    assert_same(params, hf.load(bucket, make_mesh(fsdp=4, tensor=2))[1])


def test_a_newer_export_in_a_bucket_replaces_the_older_one(folder, bucket):
    """An index left behind would be read beside the new weights; other files are not touched."""
    cfg, params = hf.load(folder)
    hf.save(bucket, cfg, params, dtype="float32", shard_bytes=20_000)
    fsspec.filesystem("memory").pipe("/bucket/model/notes.txt", b"kept")
    doubled = jax.tree.map(lambda x: x * 2, params)
    hf.save(bucket, cfg, doubled, dtype="float32")
    assert_same(doubled, hf.load(bucket)[1])
    names = [f.split("/")[-1] for f in fsspec.filesystem("memory").find("/bucket/model")]
    assert sorted(names) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_a_bucket_that_cannot_be_spoken_to_is_named(folder):
    """Before the work, and with the package that is missing."""
    cfg, params = hf.load(folder)
    with pytest.raises(ValueError, match="nosuch:// does not work here .*gcsfs for gs://"):
        hf.load("nosuch://bucket/model")
    with pytest.raises(ValueError, match="nosuch:// does not work here"):
        hf.save("nosuch://bucket/model", cfg, params)


def test_hub_names_are_found_in_the_cache(folder, tmp_path, monkeypatch):
    """With HF_HUB_OFFLINE (set for all tests) a cached model opens without the network."""
    cache = tmp_path / "cache" / "models--somebody--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert constants.HF_HUB_OFFLINE
    assert_same(hf.load(folder)[1], hf.load("somebody/small")[1])


@pytest.mark.parametrize("dtype", ["int8", jnp.int32, "float64", "half a float"])
def test_parameters_are_floats(folder, dtype):
    """As whole numbers all weights would silently be 0."""
    with pytest.raises(ValueError, match="choose one of float32, bfloat16, float16"):
        sdjax.models.from_pretrained(folder, dtype=dtype)


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
    """The two-line API: default segments and positions, packed rows, any mesh and batch."""
    model = sdjax.models.from_pretrained(folder)
    tokens = np.arange(3, 27).reshape(2, 12)
    logits = model.logits(tokens)
    assert logits.shape == (2, 12, CASE["vocab_size"]) and logits.dtype == jnp.float32
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "context": 2}):
        split = sdjax.models.from_pretrained(folder, make_mesh(**sizes)).logits(tokens)
        np.testing.assert_allclose(split, logits, atol=1e-4)

    segments = np.array([[1] * 5 + [2] * 7] * 2)
    packed = model.logits(tokens, segments)
    np.testing.assert_allclose(packed[:, :5], logits[:, :5], atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], model.logits(tokens[:, 5:]), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1, 2, 3],), r"int32\[3\], should be whole numbers"),
        (([[1.0, 2.0]],), "should be whole numbers"),
        (([[1, 96]],), "between 1 and 96, but the vocabulary has 96"),
        (([[1, -1]],), "between -1 and 1"),
        (([[1, 2]], [[1, 1, 1]]), r"segment_ids are \[1, 3\], tokens \[1, 2\]"),
        (([[1, 2]], None, [0, 1]), r"positions are \[2\]"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(model, arguments, named):
    """Lookups would clamp a token that is not in the vocabulary and go on."""
    with pytest.raises(ValueError, match=named):
        model.logits(*arguments)


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
