"""Plans: names of slices, counts against published sizes, and one real plan compiled for a TPU."""

import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from sdjax import build, config, parallel, plan
from sdjax.models import attention
from sdjax.plan import analytic, chips, hlo, known, programs, report, study
from sdjax.plan.roofline import Phase
from sdjax.rollout import EngineConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'sdjax[tpu]'",
)
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def small_config(folder):
    """A run of a two-layer model with rows long enough for the kernels."""
    (folder / "config.json").write_text(json.dumps(SMALL))
    c = config.base()
    c.model.path = str(folder)
    c.data.max_prompt_len, c.sampling.max_new_tokens = 128, 384
    c.eval.max_new_tokens = 384
    c.teacher.context.max_len = 640
    c.batch.prompts, c.batch.mini_prompts, c.batch.group_size = 16, 8, 4
    c.mesh.fsdp = 4
    c.rollout.slots, c.rollout.chunk = 16, 8
    return c


@pytest.mark.parametrize(
    "text, name, product, devices",
    [
        ("v5p:4x4x4", "v5p:4x4x4", "v5p-128", 64),
        ("v5p-128", "v5p:4x4x4", "v5p-128", 64),
        ("v6e-256", "v6e:16x16", "v6e-256", 256),
        ("v5litepod-8", "v5e:2x4", "v5litepod-8", 8),
        ("v4-8", "v4:2x2x1", "v4-8", 4),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", "tpu7x-8", 8),
    ],
)
def test_slices_by_topology_and_by_product(text, name, product, devices):
    """v5p counts cores, v5e and v6e chips: off by two, one rents half of what one planned."""
    topology = chips.parse(text)
    assert (topology.name, topology.product, topology.devices) == (name, product, devices)


@pytest.mark.parametrize("text", ["v5p", "v9:2x2", "v5e:2x2x2", "v5p-130", "v6e:0x4", ""])
def test_other_texts_are_not_slices(text):
    """One sentence with the field and an example."""
    with pytest.raises(ValueError, match="config.plan.topology=.*for example"):
        chips.parse(text)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-1.7B", 1.72),
        ("Qwen/Qwen3-8B", 8.19),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.62),
        ("allenai/Olmo-3-7B-Instruct", 7.30),
    ],
)
def test_known_architectures_have_their_published_size(name, billions):
    """A slip in the table of architectures would make every plan wrong."""
    count = analytic.parameter_count(known.model_config(name)) / 1e9
    assert count == pytest.approx(billions, rel=0.005)


def test_an_unknown_model_is_one_sentence(tmp_path):
    """No weights are needed to plan, but a config.json is."""
    with pytest.raises(ValueError, match="no config.json"):
        known.model_config(str(tmp_path / "nothing"))


def test_roofline_takes_the_slowest_clock():
    """1 TFLOP, 1 GB and 1 GB on the wire of a v5e."""
    chip = chips.CHIPS["v5e"]
    costs = hlo.Costs(1e12, 1e9, {("all-gather", "1"): (2.0, 1e9)})
    phase = Phase.of("x", 3, costs, chip)
    assert phase.clocks["compute"] == pytest.approx(1 / 197)
    assert phase.clocks["memory"] == pytest.approx(1e9 / 8.19e11)
    assert phase.bound == "wire" and phase.seconds == pytest.approx(1e9 / 9e10)
    assert phase.total_seconds == pytest.approx(3 * phase.seconds)
    assert Phase.of("x", 1, costs, chip, share=0.5).wire == 5e8


def fake_plan(c, train=10, rollout=12, suggestions=()):
    """A plan of made-up sizes in GiB, for the report."""
    chip = chips.parse("v5e:2x4")
    phase = Phase.of("train step", 2, hlo.Costs(1e12, 1e9), chip.chip)
    return study.Plan(
        c=c,
        topology=chip,
        mesh={"data": 2, "fsdp": 4, "tensor": 1, "context": 1},
        rollout_mesh={"data": 4, "fsdp": 1, "tensor": 1, "context": 1},
        hosts=2,
        parameters=10**9,
        spec=programs.PackingSpec(1, 8, 512, 1024, 512),
        attention="splash",
        train_memory={"parameters": train * study.GIB},
        rollout_memory={"parameters": study.GIB, "KV cache": (rollout - 1) * study.GIB},
        programs={"train step": programs.Program("train step", 1.0, 1, 1, 1, 1, "text")},
        phases=[phase],
        analytic_train_flops=1e12,
        slots=64,
        slots_that_fit=80,
        suggestions=list(suggestions),
    )


def test_the_report_says_whether_it_fits_and_by_how_much():
    """At most 85 % of memory by default; the larger of both phases counts."""
    c = config.base()
    good = report.to_markdown(fake_plan(c))
    assert "**Fits**: 12.00 GiB of 15.75 GiB per device (76%)" in good and "80 fit" in good
    bad = report.to_markdown(fake_plan(c, train=14, suggestions=["--config.mesh.fsdp=8 fits"]))
    assert "**Does not fit**: 14.00 GiB" in bad and "0.6 GiB over the limit of 85%" in bad
    assert "--config.mesh.fsdp=8 fits" in bad
    again = json.loads(report.to_json(fake_plan(c)))
    assert again["fits"] and again["phases"][0]["bound"] == "compute"
    table = report.comparison([fake_plan(c)])
    assert "| v5e:2x4 | v5litepod-8 | 2 x 4 x 1 x 1 | yes | 10.00 | 12.00 |" in table


def fake_study(monkeypatch, train, rollout):
    """Replaces the compiler: `train(c)` and `rollout(c)` tell GiB. Returns the list of what was
    compiled, and with which programs known."""
    seen = []

    def compiled(c, topology, suggest=None, done=None):
        c = c.copy_and_resolve_references()
        seen.append((dict(c.mesh), c.rollout.slots, c.plan.decode, sorted(done or {})))
        made = fake_plan(c, train(c), rollout(c) if c.plan.decode else 1)
        mesh = dict(zip(parallel.MESH_AXES, (1, c.mesh.fsdp, c.mesh.tensor, 1), strict=True))
        return dataclasses.replace(made, topology=topology, mesh=mesh, slots_that_fit=24)

    monkeypatch.setattr(study, "study", compiled)
    monkeypatch.setattr(study.programs, "setup", lambda c, topology: None)
    monkeypatch.setattr(study.programs, "abstract_state", lambda s: None)
    monkeypatch.setattr(study, "_resident", lambda s, state: {})
    return seen


def test_suggestions_mend_training_first_and_sampling_then(monkeypatch):
    """A run that is too large in both phases needs two changes: neither alone would ever fit."""
    seen = fake_study(
        monkeypatch, lambda c: 40 / c.mesh.fsdp, lambda c: 40 / c.mesh.fsdp + c.rollout.slots / 8
    )
    c = config.base()
    c.rollout.slots, c.mesh.fsdp = 64, 2
    bad = dataclasses.replace(fake_plan(c, 20, 28), slots_that_fit=0)
    (text,) = study._suggest(bad)
    assert text == "--config.mesh.fsdp=4 --config.rollout.slots=24 fits: 13.0 GiB per device"
    assert seen[-1][3] == ["train step"], "a change of sampling must not compile the step again"
    assert any(not decode for _, _, decode, _ in seen), "a step too large needs no decode program"


def test_suggestions_end_with_a_larger_slice(monkeypatch):
    """When nothing tried fits, one still wants to know what to ask for."""
    fake_study(monkeypatch, lambda c: 99, lambda c: 1)
    (text,) = study._suggest(fake_plan(config.base(), 99, 2))
    assert "plan for v5e:4x4 (v5litepod-16)" in text


def test_several_slices_are_compared(monkeypatch, tmp_path, capsys):
    """mesh.fsdp follows the slice; one that cannot be is a line, not the end of the comparison."""

    def train(c):
        if c.mesh.fsdp == 4:
            raise ValueError("v5e:2x2 is not for rent today")
        return 80 / c.mesh.fsdp

    fake_study(monkeypatch, train, lambda c: 2)
    c = config.base()
    c.model.path = "Qwen/Qwen3-8B"
    c.mesh.fsdp = 16
    c.plan.topologies = "v5e:2x2,v5e:2x4,v5e:4x4,v5e:4x8"
    plan.run(c, str(tmp_path))
    table = (tmp_path / "plan" / "comparison.md").read_text()
    assert "| v5e:2x4 | v5litepod-8 | 1 x 8 x 1 x 1 | yes | 10.00 |" in table
    assert "| v5e:4x4 | v5litepod-16 | 1 x 16 x 1 x 1 | yes | 5.00 |" in table
    assert "| v5e:4x8 | v5litepod-32 | 1 x 16 x 1 x 1 | yes | 5.00 |" in table
    assert "v5e:2x2: v5e:2x2 is not for rent today" in table and table in capsys.readouterr().out
    assert (tmp_path / "plan" / "v5e-4x4.json").is_file()
    c.plan.topologies = "v5e:2x2"
    c.mesh.fsdp = 4
    with pytest.raises(ValueError, match="not for rent"):
        plan.run(c, str(tmp_path))


@needs_libtpu
def test_a_program_that_does_not_fit_is_told_with_its_need():
    """XLA refuses to compile it: the size comes from its message, not from a traceback."""
    device = programs.devices(chips.parse("v5e:1x1"))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**29, 16), jnp.float32, sharding=place)
    lower = lambda: jax.jit(lambda x: x * 2 + x.sum(0)).lower(x)
    program = programs.compile_program("big", lower)
    assert not program.compiled and program.peak_bytes >= 32 * 2**30


@needs_libtpu
@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_memory_is_what_the_compiler_allows(chip):
    """The limit in XLA's own message: what "fits" is measured against."""
    device = programs.devices(chips.Topology(chip, (2, 2, 1)[: chip.dims]))[0]
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**31, 16), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as error:
        jax.jit(lambda x: x * 2 + x.sum(0)).lower(x).compile()
    limit = float(re.search(r"available HBM \(([\d.]+)G\)", str(error.value))[1])
    assert chip.hbm_bytes / 2**30 == pytest.approx(limit, abs=0.02)


@needs_libtpu
@pytest.mark.parametrize("window", [None, 1024])
def test_attention_kernels_count_what_they_visit(window):
    """Forward, dq, and dk with dv, whose grid is turned: a window shows the difference."""
    T, H, N, C = 4096, 4, 2, 128
    place = jax.sharding.SingleDeviceSharding(programs.devices(chips.parse("v5e:2x2"))[0])
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    q, k = (array(1, T, heads, C, dtype=jnp.bfloat16) for heads in (H, N))

    def loss(q, k, v, segments):
        out = attention.segment_attention(q, k, v, segments, window=window, impl="splash")
        return out.astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, array(1, T, dtype=jnp.int32))
    pairs = analytic.visible_pairs(T, window, attention.SPLASH_BLOCK)
    assert hlo.count(lowered.compile().as_text()).flops == 2 * (2 + 3 + 4) * pairs * H * C


@needs_libtpu
def test_a_slice_that_does_not_exist_is_one_sentence():
    """libtpu knows which sides hosts can fill."""
    with pytest.raises(ValueError, match="config.plan.topology=v5e:3x3 cannot be described"):
        programs.devices(chips.parse("v5e:3x3"))


@needs_libtpu
def test_the_real_run_is_planned_for_a_tpu(tmp_path, capsys):
    """Train step, prefill and decode compile for v5e:2x4 with the TPU's attention kernel; sizes and
    FLOPs agree with formulas."""
    c = small_config(tmp_path)
    c.plan.topology = "v5e:2x4"
    c.rollout.tensor = 2  # sampling with collectives among one host's devices
    plan.run(c, str(tmp_path / "run"))
    assert "**Fits**" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "plan" / "v5e-2x4.json").read_text())
    assert (tmp_path / "run" / "plan" / "v5e-2x4.md").read_text().startswith("## ")
    # float32 parameters split over fsdp 4, Adam's two moments and the teacher beside them
    cfg = known.model_config(str(tmp_path))
    shard = 4 * analytic.parameter_count(cfg) / 4
    memory = saved["train_memory"]
    assert memory["parameters"] == pytest.approx(shard, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * shard, rel=0.01)
    assert memory["teacher"] == memory["parameters"]
    # bfloat16 keys and values of 2 heads of 128 in 2 layers, 16 slots over 4 devices
    length = EngineConfig.from_config(c).buckets().lengths[-1]
    cache = 2 * 2 * 2 * 128 * 2 * length * 16 / 4
    assert saved["rollout_memory"]["KV cache"] == pytest.approx(cache)
    assert saved["train_bytes"] < saved["hbm_bytes"] and saved["slots_that_fit"] > 16
    by_name = {phase["name"]: phase for phase in saved["phases"]}
    assert set(by_name) == {"prefill", "decode step", "train step", "scoring (by formula)"}
    step = by_name["train step"]
    assert step["collectives"]["all-gather"]["bytes"] > 0
    # the whole step's FLOPs within 1 % of the formula, at the planned mean length of 192 tokens
    full = step["flops"] / ((128 + 192) / (128 + 384))
    assert full == pytest.approx(saved["analytic_train_flops"], rel=0.01)
    decode = analytic.decode_flops(cfg, 16, 512 + 32) / 4
    assert by_name["decode step"]["flops"] == pytest.approx(decode, rel=0.35)


def test_sampling_may_be_split_otherwise_than_training():
    """rollout.tensor; 0 follows mesh.tensor as far as a host's devices allow."""
    c, local = config.base(), jax.devices()[:4]
    assert build.rollout_mesh(c, local).shape["tensor"] == 1
    c.mesh.tensor = 8
    assert dict(build.rollout_mesh(c, local).shape)["data"] == 4
    c.rollout.tensor = 2
    mesh = build.rollout_mesh(c, local)
    assert (mesh.shape["data"], mesh.shape["tensor"]) == (2, 2)
    c.rollout.tensor = 3
    with pytest.raises(ValueError, match="rollout.tensor=3 does not divide the 4 devices"):
        build.rollout_mesh(c, local)


@needs_libtpu
def test_a_mesh_whose_rows_span_hosts_is_refused():
    """v5e hosts have 4 chips: tensor 8 would make two hosts pack the same rows, each its own."""
    devices = programs.devices(chips.parse("v5e:4x4"))
    assert parallel.make_mesh(tensor=4, data=-1, devices=devices).size == 16
    with pytest.raises(ValueError, match="tensor=8 x context=1 spans hosts"):
        parallel.make_mesh(tensor=8, data=-1, devices=devices)
