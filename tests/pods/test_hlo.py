"""The counter of HLO programs, against programs whose costs are known by hand and by formula."""

import jax
import jax.numpy as jnp
import pytest

from sdjax.models import decoder
from sdjax.models.config import ModelConfig
from sdjax.plan import analytic, hlo

MODULE = """HloModule m

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), window={}, dim_labels=bf_io->bf
  %r = f32[8,16]{1,0:T(8,128)} all-reduce(%y), channel_id=3, replica_groups=[2,4]<=[8]
  ROOT %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%i, %r)
}

%cond (q: (s32[], f32[8,16])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %q = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  ROOT %w.1 = (s32[]{:T(128)}, /*index=1*/f32[8,16]) while(%a), condition=%cond, body=%body
}
"""


def test_loops_count_by_their_trips():
    """XLA's own analysis counts a body once, which is wrong by the number of layers."""
    costs = hlo.count(MODULE)
    assert costs.flops == 7 * 2 * 8 * 16 * 16
    assert costs.collectives() == {"all-reduce": (7.0, 7 * 8 * 16 * 4 * 2 * 3 / 4)}


def test_buffers_on_chip_are_free():
    """The weight lies in S(1): its reads are not traffic of main memory."""
    per_trip = 2 * 8 * 16 * 4 + 2 * 8 * 16 * 4  # the product and the all-reduce's... operands
    product_only = hlo.count(MODULE.replace("all-reduce(", "negate("))
    assert product_only.bytes == 7 * per_trip


UPDATE = """HloModule u

%fused (p.0: f32[1000,16], p.1: f32[1,16], p.2: s32[], p.3: pred[1,16]) -> f32[1000,16] {
  %p.0 = f32[1000,16]{1,0} parameter(0)
  %p.1 = f32[1,16]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %p.3 = pred[1,16]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %old = f32[1,16]{1,0} dynamic-slice(%p.0, %p.2, %zero), dynamic_slice_sizes={1,16}
  %new = f32[1,16]{1,0} select(%p.3, %p.1, %old)
  ROOT %out = f32[1000,16]{1,0} dynamic-update-slice(%p.0, %new, %p.2, %zero)
}

ENTRY %main (a: f32[1000,16], b: f32[1,16], i: s32[], m: pred[1,16]) -> f32[1000,16] {
  %a = f32[1000,16]{1,0} parameter(0)
  %b = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %m = pred[1,16]{1,0} parameter(3)
  ROOT %f = f32[1000,16]{1,0} fusion(%a, %b, %i, %m), kind=kLoop, calls=%fused
}
"""


def test_a_masked_update_in_place_costs_what_it_changes():
    """How a row is written to the KV cache: counted whole, it would be a hundred times the rest."""
    row = 16 * 4
    assert hlo.count(UPDATE).bytes == row + row + 4 + 16 + row  # new, old, place, mask, written


def test_run_time_trip_counts_are_asked_for():
    """A loop bounded by a value gets what the planner knows of it, by nesting depth."""
    text = MODULE.replace("%n = s32[]{:T(128)} constant(7)", "%n = s32[]{:T(128)} add(%j, %j)")
    asked = []
    costs = hlo.count(text, lambda depth: asked.append(depth) or 5.0)
    assert asked == [0] and costs.flops == 5 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}", 8),
    ],
)
def test_group_sizes_in_all_notations(groups, size):
    """An unknown notation would count as no traffic at all."""
    costs = hlo.count(MODULE.replace("replica_groups=[2,4]<=[8]", groups))
    sent = 7 * 8 * 16 * 4 * 2 * (size - 1) / size
    assert costs.collectives()["all-reduce"][1] == pytest.approx(sent)


def test_a_batched_product_written_as_a_convolution():
    """TPU turns batch dimensions into dilated windows, whose invalid positions do no work."""
    line = (
        "%y = f32[2,2,2,256,256] convolution(%x, %w), window={size=2x2x1 lhs_dilate=2x2x1}, "
        "dim_labels=012bf_01oi2->012bf"
    )
    text = f"""HloModule m

ENTRY %main (x: f32[2,2,2,256,64], w: f32[2,2,256,64,1]) -> f32[2,2,2,256,256] {{
  %x = f32[2,2,2,256,64] parameter(0)
  %w = f32[2,2,256,64,1] parameter(1)
  ROOT {line}
}}
"""
    assert hlo.count(text).flops == 2 * (2 * 2 * 2) * 256 * 256 * 64


def test_attention_kernels_count_and_their_text_goes_on():
    """A kernel's attributes break lines after a brace: what follows must not get lost."""
    text = """HloModule m

ENTRY %main (q: bf16[4,2048,128], k: bf16[2,2048,128], g: s8[1,4,4], x: f32[8,16]) -> f32[8,8] {
  %q = bf16[4,2048,128] parameter(0)
  %k = bf16[2,2048,128] parameter(1)
  %g = s8[1,4,4] parameter(2)
  %x = f32[8,16] parameter(3)
  %splash_mha_fwd.1 = bf16[4,2048,128] custom-call(%g, %q, %k), frontend_attributes={metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="attention"}
  ROOT %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""
    blocks = 4 * 5 // 2
    attention = 2 * 2 * 4 * blocks * 512 * 512 * 128
    assert hlo.count(text).flops == attention + 2 * 8 * 8 * 16
    assert hlo.count(text.replace("fwd", "dkv")).flops == 2 * attention + 2 * 8 * 8 * 16
    # a shard of the context axis: 1,024 queries at the end of 2,048 keys
    part = text.replace("bf16[4,2048", "bf16[4,1024").replace("s8[1,4,4]", "s8[1,2,4]")
    assert hlo.count(part).flops == 2 * 2 * 4 * (3 + 4) * 512 * 512 * 128 + 2 * 8 * 8 * 16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_compiled_scan_of_products(dtype):
    """On this machine's own backend: 5 trips of a 64 x 32 by 32 x 32 product."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((64, 32), dtype), jnp.ones((5, 32, 32), dtype)
    text = jax.jit(f).lower(x, w).compile().as_text()
    if " dot(" not in text:
        pytest.skip("this backend calls a library for its products")
    assert hlo.count(text).flops == 5 * 2 * 64 * 32 * 32


CONFIGS = {
    "qwen3": ModelConfig("qwen3", 512, 64, 3, 4, 2, 16, 160, qk_norm="head", tie_embeddings=True),
    "llama": ModelConfig("llama", 320, 32, 4, 4, 1, 8, 96),
    "olmo3": ModelConfig(
        "olmo3", 384, 64, 4, 4, 4, 16, 128, qk_norm="projection", post_norm=True,
        windows=(128, 128, 128, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_that_of_the_real_pytree(name):
    """The formula must count norms, biases and an untied head."""
    cfg = CONFIGS[name]
    params = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    assert analytic.parameter_count(cfg) == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [256, 1024])
def test_forward_flops_agree_with_the_compiled_program(name, tokens):
    """Formula against compiled program within 2 %, for short rows and for blockwise attention."""
    cfg = CONFIGS[name]
    params = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)

    def f(params, ids):
        positions = jnp.broadcast_to(jnp.arange(tokens), ids.shape)
        return decoder.hidden_states(params, ids, jnp.ones_like(ids), positions, cfg)

    text = jax.jit(f).lower(params, ids).compile().as_text()
    if " dot(" not in text:
        pytest.skip("this backend calls a library for its products")
    assert hlo.count(text).flops == pytest.approx(analytic.forward_flops(cfg, 2, tokens), rel=0.02)
