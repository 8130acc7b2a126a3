"""Traces appear for the steps asked for, caches and dumps where the docs say."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sdjax import config, profiling


@pytest.mark.parametrize(
    "text, steps", [("", []), ("5", [5]), ("10:13", [10, 11, 12]), ("0:1", [0])]
)
def test_steps(text, steps):
    """The end is not included, as in a slice."""
    assert list(profiling.steps(text)) == steps


@pytest.mark.parametrize("text", ["10:10", "5:2", "a", "1:2:3", "-1"])
def test_other_steps_are_refused(text):
    """A trace that never starts would be noticed hours later."""
    with pytest.raises(ValueError, match="config.profile.steps"):
        profiling.steps(text)


def test_a_trace_of_the_steps_asked_for(tmp_path):
    """One trace of steps 1 and 2, and the devices' memory beside it; none for step 0."""
    c = config.base()
    c.profile.steps = "1:3"
    tracer = profiling.Tracer(c, str(tmp_path))
    for step in range(4):
        assert (tmp_path / "profile").exists() == (step > 1)
        with tracer.step(step):
            jax.block_until_ready(jnp.ones(8) * step)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and (tmp_path / "profile" / "memory.prof").stat().st_size > 0


def test_a_failing_step_keeps_its_trace(tmp_path):
    """What led to the failure is what one wants to see."""
    c = config.base()
    c.profile.steps = "0:5"
    tracer = profiling.Tracer(c, str(tmp_path))
    with pytest.raises(RuntimeError), tracer.step(0):
        raise RuntimeError
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


CODE = """
import sys, jax, jax.numpy as jnp
from sdjax import config, profiling
c = config.base()
c.profile.hlo = True
profiling.MIN_COMPILE_S = 0.0
profiling.prepare(c, sys.argv[1])
print(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))))
"""


def test_cache_and_dumps_land_in_the_workdir(tmp_path):
    """In a process of its own: both must be set before jax starts."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, env=env, capture_output=True)
    assert any((tmp_path / "hlo").iterdir())
    assert any((tmp_path / "xla_cache").iterdir())


def test_dumps_into_a_bucket_are_refused():
    """XLA writes them itself, to a local disk only."""
    c = config.base()
    c.profile.hlo = True
    c.profile.compilation_cache = ""
    with pytest.raises(ValueError, match="config.profile.hlo"):
        profiling.prepare(c, "gs://bucket/run")
