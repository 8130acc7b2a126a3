"""Properties that hold for any logits: signs, symmetries, limits, dead entries, exact top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.objectives import ObjectiveConfig, distillation_loss, divergence, policy_gradient_loss
from sdjax.objectives.advantages import group_advantage
from sdjax.objectives.topk import top_k_ids


def logits(seed, V=24, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(2, 3, V)).astype(np.float32)


def pair(seed):
    return [jax.nn.log_softmax(jnp.asarray(logits(s)), -1) for s in (seed, seed + 1000)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_divergence_is_positive_and_zero_only_for_equals(seed, alpha):
    p, q = pair(seed)
    assert (divergence.divergence(p, q, alpha) > 0).all()
    np.testing.assert_allclose(divergence.divergence(p, p, alpha), 0.0, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999))
def test_half_way_divergence_is_symmetric_and_bounded(seed):
    p, q = pair(seed)
    np.testing.assert_allclose(
        divergence.divergence(p, q, 0.5), divergence.divergence(q, p, 0.5), atol=2e-6
    )
    assert (divergence.divergence(p, q, 0.5) <= np.log(2) + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 23), st.sampled_from([0.0, 0.5, 1.0]))
def test_tail_bucket_never_exceeds_the_full_divergence(seed, k, alpha):
    """Merging entries loses information (data processing); a dropped tail would break this."""
    p, q = pair(seed)
    close = lambda x: divergence.close_support(x[..., :k], True)
    merged = divergence.divergence(close(p), close(q), alpha)
    assert (merged <= divergence.divergence(p, q, alpha) + 1e-5).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_top_v_equals_the_full_vocabulary(alpha, tail):
    student, teacher = jnp.asarray(logits(1)), jnp.asarray(logits(2))
    config = {"alpha": alpha, "add_tail": tail, "is_clip": np.inf}
    topk, full = (
        jax.value_and_grad(
            lambda z, extra=extra: distillation_loss(
                z, teacher, None, jnp.ones((2, 3)), config=ObjectiveConfig(**config, **extra)
            )[0]
        )(student)
        for extra in ({"distillation_topk": 24}, {"support": "full"})
    )
    np.testing.assert_allclose(topk[0], full[0], atol=1e-5)  # the bucket's floor is 1e-7
    np.testing.assert_allclose(topk[1], full[1], atol=1e-5)


def test_divergence_vanishes_at_both_ends_of_alpha():
    """METHODS 1.1: D_a / a -> KL(q||p) and D_a / (1-a) -> KL(p||q), while the ends are the KLs."""
    with jax.enable_x64(True):
        p, q = (x.astype(jnp.float64) for x in pair(3))
        p, q = jax.nn.log_softmax(p, -1), jax.nn.log_softmax(q, -1)
        small = 1e-5
        low, high = (divergence.divergence(p, q, a) for a in (small, 1 - small))
        np.testing.assert_allclose(low / small, divergence.divergence(p, q, 0.0), rtol=1e-2)
        np.testing.assert_allclose(high / small, divergence.divergence(p, q, 1.0), rtol=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_entries_give_no_nan(alpha):
    """-inf logits on both sides, in value or gradient."""
    dead = np.zeros(24, bool)
    dead[::3] = True
    student, teacher = (np.where(dead, -np.inf, logits(s)) for s in (4, 5))
    config = ObjectiveConfig(support="full", alpha=alpha)
    loss = lambda z: distillation_loss(z, teacher, None, jnp.ones((2, 3)), config=config)[0]
    value, grad = jax.value_and_grad(loss)(jnp.asarray(student))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_nan_at_masked_positions_reaches_neither_loss_nor_gradient():
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    hole = jnp.where(mask[..., None] > 0, 0.0, jnp.nan)
    student, teacher = jnp.asarray(logits(6)), jnp.asarray(logits(7))
    targets = jnp.zeros((2, 3), jnp.int32)
    config = ObjectiveConfig(distillation_topk=5)
    loss = lambda z, t: distillation_loss(z, t, targets, mask, config=config)[0]
    expected = jax.value_and_grad(loss)(student, teacher)
    actual = jax.value_and_grad(loss)(student + hole, teacher + hole)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12))
def test_blockwise_top_k_is_exact(seed, k):
    """A member of a losing block that belongs to the top k, or a padded entry that wins."""
    x = np.random.default_rng(seed).normal(size=(3, 1000)).astype(np.float32)
    ids = np.asarray(top_k_ids(jnp.asarray(x), k, block=16))
    ours = np.take_along_axis(x, ids, -1)
    np.testing.assert_array_equal(ours, -np.sort(-x)[:, :k])


def test_blockwise_top_k_with_ties_returns_distinct_ids():
    x = jnp.zeros((2, 1000)).at[:, 5].set(1.0)
    ids = np.asarray(top_k_ids(x, 10, block=16))
    assert all(len(set(row)) == 10 for row in ids.tolist()) and (ids[:, 0] == 5).all()


def test_window_is_counted_in_response_tokens():
    """skip_first and prefix_len as positions of the padded row instead of the response."""
    student, teacher = jnp.asarray(logits(14)), jnp.asarray(logits(15))
    config = {"support": "full", "loss_agg": "token-mean"}
    window = config | {"skip_first": 1, "prefix_len": 2}
    shifted, cut = np.array([[0, 1, 1], [1, 1, 1]]), np.array([[0, 0, 1], [0, 1, 0]])
    loss = lambda mask, config: distillation_loss(student, teacher, None, mask, config=config)[0]
    np.testing.assert_allclose(
        loss(jnp.asarray(shifted), window), loss(jnp.asarray(cut), config), rtol=1e-6
    )


def test_importance_ratio_of_the_sampler_is_applied_once():
    """With the sampler's log-probabilities alone, is_clip and rollout_is_clip must not multiply."""
    student, teacher = jnp.asarray(logits(8)), jnp.asarray(logits(9))
    targets, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
    base = ObjectiveConfig(support="full", is_clip=np.inf, rollout_is_clip=np.inf)
    plain, seen = distillation_loss(student, teacher, targets, mask, config=base)
    sampler = seen["student_logp"] - np.log(1.5)
    for is_clip, rollout in ((2.0, 2.0), (2.0, np.inf), (np.inf, 2.0)):
        config = ObjectiveConfig(support="full", is_clip=is_clip, rollout_is_clip=rollout)
        loss, _ = distillation_loss(
            student, teacher, targets, mask, sampler_logp=sampler, config=config
        )
        np.testing.assert_allclose(loss, 1.5 * plain, rtol=1e-5)


@pytest.mark.parametrize("support", ["full", "student_topk", "teacher_topk", "sampled"])
def test_no_gradient_reaches_the_teacher(support):
    """A live teacher that is trained to agree with the student."""
    student, teacher = jnp.asarray(logits(10)), jnp.asarray(logits(11))
    config = ObjectiveConfig(support=support, distillation_topk=5, alpha=1.0)
    targets, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
    loss = lambda z, t: distillation_loss(z, t, targets, mask, config=config)[0]
    assert np.asarray(jax.grad(loss)(student, teacher)).any()
    assert not np.asarray(jax.grad(loss, 1)(student, teacher)).any()


def test_no_gradient_reaches_teacher_or_weights_of_the_policy_term():
    """Evidence, old and sampler's log-probabilities move the loss and learn nothing from it."""
    rng = np.random.default_rng(12)
    logp, old, sampler, teacher = -rng.exponential(1.0, (4, 2, 3)).astype(np.float32)
    config = ObjectiveConfig(pg_coef=1.0, distill_coef=0.0, mod="anti_phi")
    advantage = jnp.array([1.0, -1.0])

    def loss(teacher, sampler):
        return policy_gradient_loss(
            logp, old, sampler, advantage, jnp.ones((2, 3)), config=config, teacher_logp=teacher
        )[0]

    moved = [loss(teacher, sampler), loss(teacher + 1, sampler), loss(teacher, sampler + 1)]
    assert len({float(x) for x in moved}) == 3
    for grad in jax.grad(loss, (0, 1))(jnp.asarray(teacher), jnp.asarray(sampler)):
        assert not np.asarray(grad).any()


def test_missing_inputs_are_named():
    """Ratios at token 0, or a crash deep inside, for what was not given."""
    z, ones = jnp.asarray(logits(13)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="targets is None"):
        distillation_loss(z, z, None, ones, sampler_logp=ones, config=ObjectiveConfig())
    policy = {"pg_coef": 1.0, "distill_coef": 0.0}
    for missing, extra in (("advantage", {}), ("ref_logp", {"kl_coef": 0.1})):
        advantage = None if missing == "advantage" else jnp.ones(2)
        with pytest.raises(ValueError, match=f"{missing} is None"):
            policy_gradient_loss(ones, ones, None, advantage, ones, config=policy | extra)
    with pytest.raises(ValueError, match="teacher_logp is None"):
        config = policy | {"mod": "add_u"}
        policy_gradient_loss(ones, ones, None, jnp.ones(2), ones, config=config)
    with pytest.raises(ValueError, match="topk is no field.*'source'"):
        distillation_loss(z, z, None, ones, config={"topk": 5})


def test_all_equal_group_has_no_gradient():
    advantage = group_advantage(np.ones(4), np.zeros(4))
    logp = -jnp.ones((4, 3))
    config = ObjectiveConfig(pg_coef=1.0, distill_coef=0.0)
    loss = lambda s: policy_gradient_loss(
        s, logp, logp, jnp.asarray(advantage), jnp.ones((4, 3)), config=config
    )[0]
    assert not np.asarray(jax.grad(loss)(logp)).any()
