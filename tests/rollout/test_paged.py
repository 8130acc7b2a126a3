"""The page layout: the numbers of the kernel's reference and of the row layout, on a TPU too."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import ENDS, ENGINE, MODEL, make_requests
from test_engine import same

from sdjax import parallel
from sdjax.models import decoder
from sdjax.plan import chips
from sdjax.plan import programs as plan_programs
from sdjax.rollout import cache as kv
from sdjax.rollout import paged, programs
from sdjax.rollout.engine import Engine
from sdjax.rollout.table import Table

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'sdjax[tpu]'",
)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_pages_is_the_kernels_reference(window):
    """The convention of heads, pages and lengths is that of JAX's ragged paged attention."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    B, H, N, C, S, page = 3, 4, 2, 16, 32, 8
    q_key, kv_key = jax.random.split(jax.random.key(0))
    q_B1HC = jax.random.normal(q_key, (B, 1, H, C))
    kv_BSNC = jax.random.normal(kv_key, (B, S, 2 * N, C))
    length_B = jnp.asarray([1, 17, 32])
    expected_BHC = ref_ragged_paged_attention(
        q_B1HC[:, 0],
        kv_BSNC.reshape(B * S // page, page, 2 * N, C),
        length_B,
        jnp.arange(B * S // page).reshape(B, S // page),
        jnp.arange(B + 1),
        jnp.asarray([B]),
        sm_scale=C**-0.5,
        sliding_window=window,
    )
    found = paged.attend(q_B1HC, kv_BSNC, length_B, window)
    np.testing.assert_allclose(found[:, 0], expected_BHC, atol=1e-5)


class Loaded:
    """A loaded block of pages that is cut like the reference to it."""

    def __init__(self, ref):
        self.ref, self.dtype = ref, ref.dtype

    def reshape(self, *shape):
        return self.ref[...].reshape(*shape)


@pytest.fixture
def interpretable(monkeypatch):
    """Two things that the kernel does and JAX's interpreter cannot: strided loads from a reshaped
    reference, and masked stores whose later axes are shorter than the first."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    copies = kernel.MultiPageAsyncCopyDescriptor
    wait = copies.wait
    monkeypatch.setattr(copies, "wait", lambda self: Loaded(wait(self)))

    def store(ref, value, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(kernel.pltpu, "store", store)


@pytest.mark.parametrize("window", [None, 9])
def test_the_kernel_interpreted_agrees_with_the_fallback(interpretable, window):
    """Pages, lengths, heads and windows as we hand them to the kernel; float32."""
    from jax.experimental.pallas import tpu as pltpu

    B, H, N, C, S = 3, 4, 2, 128, 32
    q_key, kv_key = jax.random.split(jax.random.key(1))
    q_B1HC = jax.random.normal(q_key, (B, 1, H, C))
    kv_BSNC = jax.random.normal(kv_key, (B, S, 2 * N, C))
    length_B = jnp.asarray([1, 17, 32])
    with pltpu.force_tpu_interpret_mode():
        found = paged.attend_kernel(q_B1HC, kv_BSNC, length_B, window=window)
    wanted = paged.attend_xla(q_B1HC, kv_BSNC, length_B, window=window)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_pages_sample_what_rows_sample(params, engine):
    """Other slots, chunks, prefill batches and another layout: the same tokens."""
    cfg = dataclasses.replace(
        ENGINE, cache_layout="pages", slots=6, chunk=5, prefill_tokens=512, first_length=64
    )
    pages = Engine(MODEL, cfg, parallel.single_device_mesh(), ENDS)
    requests = make_requests(7, seed=7, n=2)
    assert same(engine.generate(params, requests), pages.generate(params, requests))


def test_pages_have_no_int8():
    with pytest.raises(ValueError, match="has no int8"):
        kv.CacheSpec.of(MODEL, "int8", "pages")


@needs_libtpu
@pytest.mark.parametrize("tensor", [1, 2])
def test_decode_compiles_for_a_tpu_with_the_kernel_in_it(tensor):
    """A chunk of decode steps over pages, compiled by the TPU's own compiler for v5e chips."""
    found = plan_programs.devices(chips.parse("v5e:2x2"))[: 2 * tensor]
    mesh = parallel.make_mesh(data=2, tensor=tensor, devices=found)
    cfg = dataclasses.replace(MODEL, head_dim=128, n_layers=1, vocab_size=512, windows=(None,))
    spec = kv.CacheSpec.of(cfg, "bfloat16", "pages")
    static = programs.Static(cfg, spec, ENDS, 8, "bfloat16", 64, False)
    whole = parallel.replicated(mesh)
    place = lambda tree, where: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
    )
    layer = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kv.shardings(spec, mesh)[name])
        for name, x in spec.shapes(8, 256).items()
    }
    build = lambda: decoder.unstack_layers(
        decoder.init_params(cfg, jax.random.key(0), jnp.bfloat16), cfg
    )
    weights = place(jax.eval_shape(build), whole)
    slots = place(Table(8).slots(8), whole)
    stop_after = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    function = functools.partial(programs.decode, static=static)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=1).lower(weights, [layer], slots, stop_after)
        compiled = lowered.compile()
    assert "ragged_paged_attention" in compiled.as_text()
    pages = sum(x.size * x.dtype.itemsize for x in layer.values())
    # the pages are updated in place: no second copy of the cache among the temporaries
    assert compiled.memory_analysis().temp_size_in_bytes < pages * 8
