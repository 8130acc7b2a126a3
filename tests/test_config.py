"""The base config, every file in configs/, and the sentences that a mistake gets."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from sdjax import config

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_and_variant_is_valid(path):
    """A config that cannot be constructed is found here, not on a pod."""
    module = load(path)
    for variant in ("", "tiny", *getattr(module, "VARIANTS", {})):
        config.check(module.get_config(variant))  # raises for what is not valid


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith(("sdpo_", "grpo_"))])
def test_paper_configs_offer_the_ablations(path):
    """A variant that is no longer offered would no longer be checked above."""
    names = {"mini64", "v6e"}
    if path.stem.startswith("sdpo_"):
        names |= {"ema0.05", "lr1e-6", "topk256", "no_think_context", "solution_context"}
    if path.stem.endswith("_qwen"):
        names |= {"nothink", "coverage", "1.7b"}
    assert set(load(path).VARIANTS) == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_unknown_variant_lists_the_known_ones(path):
    with pytest.raises(ValueError, match="unknown config variant 'nonsense': known are .*tiny"):
        load(path).get_config("nonsense")


def test_a_smoke_run_needs_one_device():
    """What is set for a slice must not outlive the variant `tiny`."""
    for path in CONFIGS:
        c = load(path).get_config("tiny")
        assert (c.mesh.fsdp, c.mesh.tensor, c.mesh.context, c.rollout.tensor) == (1, 1, 1, 0)


def test_paper_values():
    """Tables 8 to 10, so that an edit of the base cannot change the runs in silence."""
    sdpo = load(ROOT / "configs/sdpo_qwen.py").get_config()
    assert (sdpo.batch.prompts, sdpo.batch.mini_prompts, sdpo.batch.group_size) == (256, 128, 8)
    assert (sdpo.data.max_prompt_len, sdpo.sampling.max_new_tokens) == (2048, 20480)
    assert (sdpo.optimizer.warmup_steps, sdpo.optimizer.weight_decay) == (10, 0.01)
    assert (sdpo.optimizer.clip_norm, sdpo.optimizer.lr, sdpo.teacher.ema_rate) == (1.0, 1e-5, 0.0)
    assert (sdpo.objective.alpha, sdpo.objective.distillation_topk) == (0.5, 100)
    grpo = load(ROOT / "configs/grpo_qwen.py").get_config()
    assert (grpo.objective.clip_low, grpo.objective.clip_high) == (0.2, 0.28)
    assert (grpo.objective.rollout_is_clip, grpo.objective.kl_coef) == (2.0, 0.0)
    assert (grpo.optimizer.lr, grpo.objective.pg_coef, grpo.objective.distill_coef) == (1e-6, 1, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher.ema_rate": 2.0}, r"config\.teacher\.ema_rate is 2\.0, but must lie in \[0, 1\]"),
        ({"mode": "trian"}, r"config\.mode is 'trian', but must be one of train"),
        ({"batch.mini_prompts": 100}, r"config\.batch\.mini_prompts is 100, which does not divide"),
        ({"objective.support": "sampled"}, r"config\.objective\.alpha is 0\.5: set alpha=1"),
        ({"objective.distill_coef": 0.0}, r"nothing would be learnt"),
        ({"sampling.top_p": 0.9}, r"allow_truncated_sampling"),
    ],
)
def test_bad_value_is_named(changes, sentence):
    c = config.base()
    for path, value in changes.items():
        c.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=sentence):
        config.check(c)


def test_mesh_that_does_not_divide_the_batch():
    c = config.base()
    c.batch.prompts = c.batch.mini_prompts = 30
    c.batch.group_size = 7
    with pytest.raises(ValueError, match="30 x group_size=7 = 210 .* nearest are 24 or 32 prompts"):
        config.check(c, device_count=8)
    c.mesh.fsdp = 3
    with pytest.raises(ValueError, match="does not multiply to the 8 devices"):
        config.check(c, device_count=8)


def run_main(*args):
    return subprocess.run(
        [sys.executable, "-m", "sdjax.main", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--config.teacher.ema_rat=0.05"], 'Did you mean "ema_rate" instead of "ema_rat"'),
        (["--config.teacher.ema_rate=high"], "--config.teacher.ema_rate=high: could not convert"),
        (["--config=configs/nope.py"], "configs/nope.py: there is no such file"),
        (["--config=configs/tiny.py:nope"], "unknown config variant 'nope': known are"),
        (["--config.train.steps=-1"], "config.train.steps is -1, but must lie in"),
        # fields may come before the file that they belong to
        (["--config.train.steps=-1", "--config=configs/tiny.py"], "config.train.steps is -1"),
        (["surplus"], "unknown argument 'surplus'"),
    ],
)
def test_command_line_mistakes_get_one_sentence(args, sentence):
    done = run_main(*args)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_field_is_read_somewhere():
    """A knob that nobody reads is a lie (lmpo had three)."""
    text = "\n".join(
        p.read_text(encoding="utf-8")
        for p in (ROOT / "sdjax").rglob("*.py")
        if p.name != "config.py"
    )
    unread = [
        path
        for path in _paths(config.base())
        if not re.search(rf"""(\.|["'\[]){re.escape(path.split(".")[-1])}\b""", text)
    ]
    assert unread == []


def _paths(c, prefix=""):
    for name, value in c.items():
        if isinstance(value, type(c)):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name
