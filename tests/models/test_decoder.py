"""The decoder against itself: scanned or unrolled, on a mesh, packed or alone, cached or not."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import decoder, rope
from sdjax.models.config import ModelConfig
from sdjax.parallel import make_mesh

CFG = ModelConfig.from_hf(families.CASES["qwen3-gqa7-yarn-window"] | {"num_attention_heads": 4})


ALIKE = dataclasses.replace(CFG, windows=(5,) * 3)  # one kind of layer compiles in half the time
hidden_states = jax.jit(
    decoder.hidden_states, static_argnums=4, static_argnames=("compute_dtype", "remat")
)


def rows(B=2, T=12):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 90, (B, T)), jnp.int32)
    return tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(T), (B, T))


@pytest.mark.parametrize(
    "windows", [(None,) * 4, (4, 4, 4, None), (4, None) * 2, (None, None, None, 4)]
)
def test_scanned_equals_unrolled(windows):
    """Layers of several kinds end up in the right order with the right window, state included."""
    cfg = dataclasses.replace(CFG, n_layers=4, windows=windows)
    params, (tokens, _, positions) = families.random_params(cfg), rows()
    seen = []

    def attend(q, k, v, state, window):
        seen.append(window)
        keep = k if window is None else k * 0.5
        return q * 0.1, state + keep.sum()

    state = jnp.arange(4.0)
    run = jax.jit(
        lambda params, state: decoder.forward(
            params, tokens, positions, cfg, attend=attend, layer_state=state
        )
    )
    scanned = run(params, state)
    seen.clear()
    unrolled = run(decoder.unstack_layers(params, cfg), tuple(state))
    assert tuple(seen) == windows
    np.testing.assert_allclose(scanned[0], unrolled[0], atol=2e-5)
    np.testing.assert_allclose(scanned[1], jnp.stack(unrolled[1]), rtol=1e-4)


@pytest.mark.parametrize("windows", [(None,), (4, 4, 4, None)])
def test_the_program_does_not_grow_with_depth(windows):
    """32 layers are compiled as 4 are: one scan over the stack, whatever the pattern of windows."""

    def program(layers):
        cfg = dataclasses.replace(CFG, n_layers=layers, windows=windows * (layers // len(windows)))
        params = jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32),
            decoder.param_specs(cfg),
            is_leaf=decoder.is_spec,
        )
        return hidden_states.lower(params, *rows(), cfg).as_text()

    assert program(32).count("\n") == program(4 if windows == (None,) else 8).count("\n")


def test_packed_sequences_do_not_see_each_other():
    """Two sequences in one row give the hidden states that each gives alone."""
    params, (tokens, segments, positions) = families.random_params(CFG), rows(B=1)
    segments = jnp.where(jnp.arange(12) < 5, 1, 2)[None]
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    packed = hidden_states(params, tokens, segments, positions, CFG)
    for part in (slice(0, 5), slice(5, 12)):
        alone = hidden_states(params, tokens[:, part], segments[:, part], positions[:, part], CFG)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)


def test_a_cache_gives_the_same_as_the_whole_row():
    """Token by token through `layer_state`, as the rollout engine does."""
    params, (tokens, segments, positions) = families.random_params(CFG), rows(B=1)
    whole = hidden_states(params, tokens, segments, positions, CFG)
    shape = (CFG.n_layers, 1, 12, CFG.n_kv_heads, CFG.head_dim)
    cache, index = (jnp.zeros(shape), jnp.zeros(shape)), jnp.arange(12)

    @jax.jit
    def step(cache, t):
        def attend(q, k, v, state, window):
            keys, values = state[0].at[:, t].set(k[:, 0]), state[1].at[:, t].set(v[:, 0])
            seen = (index <= t) & (index > t - (12 if window is None else window))
            return jax.nn.dot_product_attention(q, keys, values, mask=seen[None, None, None]), (
                keys,
                values,
            )

        token, position = tokens[:, t, None], positions[:, t, None]
        return decoder.forward(params, token, position, CFG, attend=attend, layer_state=cache)

    for t in range(12):
        hidden, cache = step(cache, t)
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], atol=2e-5)


def test_remat_changes_no_gradient():
    params, args = families.random_params(ALIKE), rows()

    def loss(params, remat):
        return jnp.sum(jnp.sin(decoder.hidden_states(params, *args, ALIKE, remat=remat)))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    wanted = grad(params, "none")
    for remat in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
            grad(params, remat),
            wanted,
        )


def test_remat_dots_keeps_the_products_that_full_computes_again():
    """Products hidden from the policy, as in a custom derivative: "dots" would be a slow "full"."""
    params, args = families.random_params(ALIKE), rows()

    def products(remat):
        loss = lambda params: jnp.sum(decoder.hidden_states(params, *args, ALIKE, remat=remat))
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("none") <= products("dots") < products("full")


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 4, "tensor": 2},
        {"fsdp": 2, "tensor": 2, "context": 2},
    ],
)
def test_logits_do_not_depend_on_the_mesh(sizes):
    """Also checks that each device holds only its part of a split parameter."""
    params, args = families.random_params(ALIKE), rows(B=8)
    mesh = make_mesh(**sizes)

    @jax.jit
    def run(params, *args):
        return decoder.logits(params, decoder.hidden_states(params, *args, ALIKE), ALIKE)

    wanted = run(params, *args)
    placed = jax.tree.map(jax.device_put, params, decoder.param_shardings(ALIKE, mesh))
    w_q = placed["layers"]["w_q"]
    shard = w_q.addressable_shards[0].data.size
    assert shard * sizes.get("fsdp", 1) * sizes.get("tensor", 1) == w_q.size
    with jax.set_mesh(mesh):
        got = run(placed, *args)
    np.testing.assert_allclose(np.asarray(got), wanted, atol=2e-5)


def test_shardings_refuse_what_does_not_split():
    with pytest.raises(ValueError, match=r"layers.b_k has 2 entries.*mesh.tensor=8"):
        decoder.param_shardings(dataclasses.replace(CFG, n_heads=8), make_mesh(tensor=8))


def test_init_params_matches_its_specs():
    """Shapes, dtype and scale of fresh parameters; the same key gives the same draw."""
    cfg = ModelConfig("llama", 32, 32, 1, 4, 4, 8, 32)
    params = decoder.init_params(cfg, jax.random.key(0), jnp.bfloat16)

    def check(x, spec):
        assert x.shape == spec.shape and x.dtype == jnp.bfloat16
        std = float(jnp.std(x.astype(jnp.float32)))
        assert std == 0 if isinstance(spec.init, str) else 0.7 < std / spec.init < 1.3

    jax.tree.map(check, params, decoder.param_specs(cfg))


def test_rope_rotates_pairs_of_halves():
    """Component i turns with component i + C/2, counter-clockwise; attention alone cannot tell."""
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    angles = rope.angles(rope.Rope(theta=100.0), jnp.array([[3]]), 4)
    np.testing.assert_allclose(
        rope.rotate(x, angles)[0, 0, 0], [np.cos(3), 0, np.sin(3), 0], atol=1e-6
    )
    x = jnp.zeros((1, 1, 1, 4)).at[..., 3].set(1.0)
    np.testing.assert_allclose(
        rope.rotate(x, angles)[0, 0, 0], [0, -np.sin(0.3), 0, np.cos(0.3)], atol=1e-6
    )


def test_hidden_states_follow_the_compute_dtype():
    """bfloat16 compute gives bfloat16 hidden states and float32 logits, near the float32 ones."""
    params, args = families.random_params(ALIKE), rows()
    exact = decoder.logits(params, hidden_states(params, *args, ALIKE), ALIKE)
    hidden = hidden_states(params, *args, ALIKE, compute_dtype=jnp.bfloat16)
    rough = decoder.logits(params, hidden, ALIKE)
    assert hidden.dtype == jnp.bfloat16 and rough.dtype == jnp.float32
    assert 1e-4 < jnp.abs(rough - exact).mean() < 0.1


@pytest.mark.parametrize(
    ("equation", "inputs", "outputs"),
    [
        ("btd,df->btf", (6,), (10,)),
        ("btf,fd->btd", (10,), (6,)),
        ("btd,dhc->bthc", (6,), (2, 5)),
        ("btd,dnc->btnc", (12,), (2, 3)),
        ("bthc,hcd->btd", (2, 5), (6,)),
        ("bthc,hcd->btd", (2, 2), (6,)),
    ],
)
def test_products_have_the_gradients_of_einsum(equation, inputs, outputs):
    """A transposed or misplaced axis in the hand-made backward pass, whichever side is wider."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, *inputs))
    weight = jax.random.normal(keys[1], (*inputs, *outputs))
    seed = jax.random.normal(keys[2], (2, 3, *outputs))
    plain = lambda x, w: (jnp.einsum(equation, x, w) * seed).sum()
    ours = lambda x, w: (decoder.product(x, {"w": w}, "w", equation) * seed).sum()
    expected = jax.value_and_grad(plain, (0, 1))(x, weight)
    actual = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, weight)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
