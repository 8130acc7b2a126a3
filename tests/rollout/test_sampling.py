"""Every sampler setting against a plain NumPy reference, and the randomness it is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.rollout import sampling

DRAWS = 20_000
_sample = jax.jit(sampling.sample, static_argnums=(3, 4, 6))


def sample(
    logits_BV, settings, uniform_B2, candidates=16, by_row=False, forced_B=None, rows_last=False
):
    """The jitted sampler with arguments of one kind, so that equal shapes compile once."""
    rows = logits_BV.shape[0]
    forced_B = np.full(rows, -1) if forced_B is None else forced_B
    uniform_B2 = np.broadcast_to(np.asarray(uniform_B2, np.float32), (rows, 2))
    strong = lambda x: np.asarray(x, np.asarray(x).dtype)
    arrays = jax.tree.map(strong, (logits_BV, settings))
    if rows_last:
        arrays = (np.ascontiguousarray(np.asarray(arrays[0]).T), arrays[1])
    return _sample(*arrays, uniform_B2, candidates, by_row, forced_B.astype(np.int32), rows_last)


SETTINGS = {
    "plain": dict(),
    "cold": dict(temperature=0.6),
    "hot": dict(temperature=1.7),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "top_k+top_p": dict(top_k=7, top_p=0.7),
    "all": dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.05),
    "top_p beyond the candidates": dict(top_p=0.97),
    "top_k beyond the candidates": dict(top_k=40, top_p=0.95),
    "top_p 0": dict(top_p=0.0),
    "top_p almost 1": dict(top_p=0.9999),
    "top_k 1": dict(top_k=1),
    "top_k of the whole vocabulary": dict(top_k=1000, top_p=0.9),
    "min_p 1": dict(min_p=1.0),
    "min_p+top_k": dict(temperature=1.3, top_k=12, min_p=0.2),
    "min_p+top_p": dict(top_p=0.95, min_p=0.02),
    "freezing": dict(temperature=1e-3),
    "boiling": dict(temperature=1e3, top_p=0.5),
}


def settings(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> sampling.Settings:
    return sampling.Settings(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    )


def reference(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities before and after truncation: sort, cut, renormalise, in float64."""
    x_V = np.asarray(logits_V, np.float64) / temperature
    p_V = np.exp(x_V - x_V.max())
    p_V /= p_V.sum()
    order = np.argsort(-p_V, kind="stable")
    cut_V = p_V[order].copy()
    if top_k:
        cut_V[top_k:] = 0.0
        cut_V /= cut_V.sum()
    before_V = np.cumsum(cut_V) - cut_V
    keep_V = (cut_V > 0) & ((before_V < top_p) | (np.arange(len(p_V)) == 0))
    keep_V &= p_V[order] >= min_p * p_V.max()
    kept_V = np.zeros_like(p_V)
    kept_V[order[keep_V]] = p_V[order[keep_V]]
    return p_V, kept_V / kept_V.sum()


def draw_many(logits_V, seed=0, candidates=16, rows=2_000, by_row=False, **options):
    """`DRAWS` draws from one distribution, as many rows of one batch at different positions."""
    logits_BV = jnp.broadcast_to(logits_V, (rows, len(logits_V)))
    draws = []
    for start in range(0, DRAWS, rows):
        key_B2 = sampling.request_keys(*[jnp.full(rows, seed, jnp.uint32)] * 3)
        uniform_B2 = sampling.uniforms(key_B2, jnp.arange(start, start + rows))
        draws.append(sample(logits_BV, settings(rows, **options), uniform_B2, candidates, by_row))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *draws)


def chi_square(token, p_V) -> float:
    """Pearson's statistic in standard deviations above its mean; rare cells are joined."""
    observed_V = np.bincount(token, minlength=len(p_V))
    assert observed_V[p_V == 0].sum() == 0, "a truncated token was drawn"
    expected_V = p_V * len(token)
    common_V = expected_V >= 5
    observed = np.append(observed_V[common_V], observed_V[~common_V].sum())
    expected = np.append(expected_V[common_V], max(expected_V[~common_V].sum(), 1e-9))
    cells = max(1, int((expected > 1e-6).sum()) - 1)
    statistic = ((observed - expected) ** 2 / expected)[expected > 1e-6].sum()
    return float((statistic - cells) / np.sqrt(2 * cells))


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_reference_distribution(name):
    """Catches a wrong order of truncations, an off-by-one nucleus and a biased inverse CDF."""
    options = SETTINGS[name]
    logits_V = (
        np.random.default_rng(1).normal(size=300).astype(np.float32) * 1.5
    )  # 3 blocks, padded
    p_V, kept_V = reference(logits_V, **options)
    draw = draw_many(logits_V, **options)
    assert chi_square(draw.token, kept_V) < 4
    np.testing.assert_allclose(draw.logp, np.log(p_V[draw.token]), atol=2e-5)
    np.testing.assert_allclose(draw.truncated_logp, np.log(kept_V[draw.token]), atol=2e-5)
    assert draw.finite.all()


def test_a_mixture_of_requests_follows_each_rows_own_distribution():
    """20,000 draws of each of eight kinds of request in one batch, the vocabulary in front."""
    logits_V = np.random.default_rng(4).normal(size=300).astype(np.float32) * 1.5
    names = ("plain", "cold", "top_k", "top_p", "min_p", "all", "min_p+top_p")
    options = [SETTINGS[name] for name in names] + [dict(temperature=0.0)]
    repeats, kinds = 2_000, len(options)
    kind = [settings(1, **given) for given in options]
    mixed = jax.tree.map(lambda *leaves: np.tile(np.concatenate(leaves), repeats), *kind)
    logits_BV = np.broadcast_to(logits_V, (repeats * kinds, 300))
    tokens = []
    for start in range(0, DRAWS, repeats):
        place_B = jnp.asarray(start + np.arange(repeats * kinds) // kinds)
        kind_B = jnp.asarray(np.arange(repeats * kinds) % kinds, jnp.uint32)
        key_B2 = sampling.request_keys(jnp.full_like(kind_B, 9), kind_B, kind_B)
        uniform_B2 = sampling.uniforms(key_B2, place_B)
        draw = sample(logits_BV, mixed, uniform_B2, by_row=True, rows_last=True)
        tokens.append(np.asarray(draw.token).reshape(repeats, kinds))
    for i, token in enumerate(np.concatenate(tokens).T):
        if options[i].get("temperature") == 0.0:
            assert set(token.tolist()) == {int(logits_V.argmax())}
        else:
            assert chi_square(token, reference(logits_V, **options[i])[1]) < 4, options[i]


@pytest.mark.parametrize("by_row", [False, True])
def test_the_vocabulary_may_stand_in_front(by_row):
    """[V, B], as a CPU's head product leaves logits: the same draws of every kind of row."""
    rng = np.random.default_rng(7)
    logits_BV = (rng.normal(size=(8, 1000)) * 2).astype(np.float32)
    s = sampling.Settings(
        jnp.asarray([1, 0, 0.7, 1, 1, 2, 1, 1], jnp.float32),
        jnp.asarray([0, 0, 3, 0, 200, 0, 9, 0]),
        jnp.asarray([1, 1, 1, 0.5, 0.99, 0.999, 0.9, 1], jnp.float32),
        jnp.asarray([0, 0, 0, 0.2, 0, 0, 0.01, 0], jnp.float32),
    )
    forced_B = np.array([-1] * 7 + [999])
    uniform_B2 = rng.random((8, 2))
    wanted = sample(logits_BV, s, uniform_B2, 16, by_row, forced_B)
    found = sample(logits_BV, s, uniform_B2, 16, by_row, forced_B, rows_last=True)
    assert found.token.tolist() == wanted.token.tolist() and int(found.token[7]) == 999
    np.testing.assert_allclose(found.logp, wanted.logp, rtol=1e-5)
    np.testing.assert_allclose(found.truncated_logp, wanted.truncated_logp, rtol=1e-5, atol=1e-6)


HARD = {
    "flat": np.zeros(512),
    "two heights": np.where(np.arange(512) % 2, 0.0, 1e-6),
    "ties at the edge": np.repeat(np.arange(8.0), 64)[::-1],
    "one giant": np.where(np.arange(512) == 300, 90.0, 0.0),
    "few are possible": np.where(np.arange(512) % 100 == 0, 0.0, -np.inf),
    "candidates tie with the rest": np.where(np.arange(512) < 16, 1.0, 1.0 - 1e-3),
}


@pytest.mark.parametrize("name", HARD)
def test_adversarial_rows_keep_what_a_sort_keeps(name):
    """Nuclei that spill over the candidates, and ties: all tied tokens stay, none below does."""
    logits_V = HARD[name].astype(np.float32)
    cases = [dict(top_p=0.5), dict(top_p=0.999), dict(top_p=0.0), dict(top_k=1), dict(top_k=16)]
    cases += [dict(top_k=17), dict(top_k=100, top_p=0.5), dict(min_p=1.0), dict(min_p=0.5)]
    cases += [dict(top_p=1.0), dict(temperature=1e-4, top_p=0.9), dict(temperature=0.0)]
    logits_BV, uniform_B2 = (
        np.broadcast_to(logits_V, (8, 512)),
        np.random.default_rng(8).random((8, 2)),
    )
    for options in cases:
        draw = sample(logits_BV, settings(8, **options), uniform_B2)
        assert draw.finite.all(), options
        if options.get("temperature") == 0.0:
            assert set(draw.token.tolist()) == {int(logits_V.argmax())}
            continue
        p_V, kept_V = reference(logits_V, **options)
        kept_V = (logits_V >= logits_V[kept_V > 0].min()) & np.isfinite(logits_V)
        assert kept_V[draw.token].all(), options
        # the kept mass is that of exactly these tokens
        expected = np.log(p_V[draw.token] / p_V[kept_V].sum())
        np.testing.assert_allclose(draw.truncated_logp, expected, atol=2e-5, err_msg=str(options))


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-7, 1e7, 1e30, 3e38])
def test_extreme_temperatures_leave_a_distribution(temperature):
    """Cold ones are greedy, hot ones flat; neither turns finite logits into a broken row."""
    logits_BV = np.random.default_rng(5).normal(size=(8, 512)).astype(np.float32) * 30
    logits_BV[:, :100] = -np.inf
    uniform_B2 = np.random.default_rng(6).random((8, 2))
    for options in (dict(), dict(top_p=0.9), dict(top_k=400), dict(min_p=0.5)):
        draw = sample(logits_BV, settings(8, temperature, **options), uniform_B2)
        assert draw.finite.all() and (draw.token >= 100).all()
        assert not np.isnan(draw.logp).any() and not np.isnan(draw.truncated_logp).any()
        if temperature < 1:
            assert draw.token.tolist() == logits_BV.argmax(1).tolist()
        elif not options:
            np.testing.assert_allclose(draw.logp, -np.log(412), atol=1e-4)


@pytest.mark.parametrize("by_row", [False, True])
def test_fallback_finds_the_floor_that_a_sort_finds(by_row):
    """Flat rows need the exact bisection; rows beside them are solved by candidates."""
    rng = np.random.default_rng(2)
    logits_BV = rng.normal(size=(6, 1000)).astype(np.float32) * np.array(
        [[0.1], [8], [1], [0], [3], [1]]
    )
    top_k = np.array([0, 0, 500, 0, 7, 300])
    top_p = np.array([0.9, 0.9, 1.0, 0.5, 0.9, 0.6])
    s = sampling.Settings(
        jnp.ones(6), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32), jnp.zeros(6)
    )
    uniform_B2 = jnp.asarray(rng.random((6, 2)), jnp.float32)
    draw = sample(jnp.asarray(logits_BV, jnp.float32), s, uniform_B2, 32, by_row)
    for row in range(6):
        _, kept_V = reference(logits_BV[row], top_k=top_k[row], top_p=top_p[row])
        if row == 3:  # all tied: a floor keeps every tied token
            kept_V = np.full(1000, 1e-3)
        assert kept_V[draw.token[row]] > 0
        expected = np.log(kept_V[draw.token[row]])
        np.testing.assert_allclose(draw.truncated_logp[row], expected, atol=3e-4)


def padded(logits, rows=8, vocab=512):
    """Logits in the one shape that the small tests share, the rest never drawn."""
    logits = jnp.asarray(logits, jnp.float32)
    spare = ((0, rows - logits.shape[0]), (0, vocab - logits.shape[1]))
    return jnp.pad(logits, spare, constant_values=-jnp.inf).at[len(logits) :, 0].set(0.0)


def test_rows_with_different_settings_do_not_touch_each_other():
    """A row's token is the same alone and beside truncating, greedy or flat neighbours."""
    rng = np.random.default_rng(3)
    logits_BV = jnp.asarray(rng.normal(size=(8, 512)) * 2, jnp.float32)
    s = sampling.Settings(
        jnp.asarray([1, 0, 0.7, 1, 1, 2, 1, 0], jnp.float32),
        jnp.asarray([0, 0, 3, 0, 200, 0, 9, 5]),
        jnp.asarray([1, 1, 1, 0.5, 0.99, 0.999, 0.9, 1], jnp.float32),
        jnp.asarray([0, 0, 0, 0.2, 0, 0, 0.01, 0], jnp.float32),
    )
    uniform_B2 = jnp.asarray(rng.random((8, 2)), jnp.float32)
    together = sample(logits_BV, s, uniform_B2)
    for b in range(8):
        alike = lambda x, b=b: jnp.broadcast_to(x[b : b + 1], x.shape)
        alone = sample(alike(logits_BV), jax.tree.map(alike, s), alike(uniform_B2), 16)
        assert int(alone.token[0]) == int(together.token[b])
        np.testing.assert_allclose(alone.truncated_logp[0], together.truncated_logp[b], atol=1e-6)


def test_greedy_takes_the_first_of_the_largest():
    logits_BV = padded([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 1.0, 5.0]])
    draw = sample(logits_BV, settings(8, temperature=0.0), 0.99)
    assert draw.token.tolist()[:2] == [1, 0]
    assert draw.truncated_logp.tolist() == [0.0] * 8
    expected_B = jax.nn.log_softmax(logits_BV)[jnp.arange(8), draw.token]
    np.testing.assert_allclose(draw.logp, expected_B, 1e-6)


def test_streams_depend_on_every_name_and_on_nothing_else():
    """A stream that ignored the sample index would give all responses of a group one answer."""
    base = np.array([3, 4, 5])
    rows = np.stack([base, base, base + [1, 0, 0], base + [0, 1, 0], base + [0, 0, 1]])
    key_B2 = sampling.request_keys(*(jnp.asarray(column, jnp.uint32) for column in rows.T))
    uniform_B2 = np.asarray(sampling.uniforms(key_B2, jnp.full(5, 9)))
    assert (uniform_B2[0] == uniform_B2[1]).all()
    assert len({tuple(u) for u in uniform_B2.tolist()}) == 4
    later_B2 = np.asarray(sampling.uniforms(key_B2, jnp.full(5, 10)))
    assert (later_B2 != uniform_B2).all()
    many_B2 = np.asarray(sampling.uniforms(jnp.tile(key_B2[:1], (20_000, 1)), jnp.arange(20_000)))
    assert 0 <= many_B2.min() and many_B2.max() < 1
    np.testing.assert_allclose(many_B2.mean(0), 0.5, atol=0.01)
    assert abs(np.corrcoef(many_B2.T)[0, 1]) < 0.03


def test_broken_logits_are_reported_not_sampled_over():
    logits_BV = jnp.zeros((8, 512)).at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf).at[3].set(-jnp.inf)
    draw = sample(logits_BV, settings(8, top_p=0.9), 0.5)
    assert draw.finite.tolist() == [True, False, False, False] + [True] * 4


def test_masked_tokens_are_never_drawn():
    """-inf logits have weight 0 even where a uniform of 0 or nearly 1 points at them."""
    logits_V = jnp.full(512, -jnp.inf).at[jnp.asarray([130, 131, 390])].set(0.0)
    top = 1 - 2**-24
    uniform_B2 = jnp.asarray([[0, 0], [0, top], [top, 0], [top, top]] * 2, jnp.float32)
    draw = sample(jnp.broadcast_to(logits_V, (8, 512)), settings(8), uniform_B2)
    assert draw.token.tolist()[:4] == [130, 131, 390, 390]


def test_forced_tokens_are_scored_not_drawn():
    """Their log-probability is after temperature, whatever the truncation would have left."""
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(8, 512)), jnp.float32)
    forced_B = np.array([7, -1, 300, -1, -1, -1, -1, -1])
    s = settings(8, temperature=0.5, top_k=1)
    draw = sample(logits_BV, s, 0.5, forced_B=forced_B)
    logp_BV = np.asarray(jax.nn.log_softmax(logits_BV / 0.5))
    assert draw.token.tolist()[0::2][:2] == [7, 300]
    np.testing.assert_allclose(draw.logp[0], logp_BV[0, 7], rtol=1e-5)
    np.testing.assert_allclose(draw.truncated_logp[2], logp_BV[2, 300], rtol=1e-5)
    assert int(draw.token[1]) == int(logp_BV[1].argmax())
