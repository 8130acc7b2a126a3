"""Combinations that no recorded case covers, against closed forms written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.objectives import distillation_loss, policy_gradient_loss
from tests.objectives import closed_forms as by_hand

B, T, V = 3, 5, 20
AGGS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
MASKS = {
    "full": np.ones((B, T)),
    "ragged": np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0.0]]),
    "empty_row": np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0.0]]),
    "nothing": np.zeros((B, T)),
}


def arrays(seed, scale=2.0):
    """Logits of student and teacher, targets, and log-probabilities near the student's."""
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, B, T, V))
    targets = rng.integers(0, V, (B, T))
    logp = np.take_along_axis(by_hand.log_softmax(student), targets[..., None], -1)[..., 0]
    near = lambda spread: logp + spread * rng.normal(size=(B, T))
    return student, teacher, targets, near(0.6), near(0.3)


def combinations(count, **choices):
    """`count` random members of the product of the choices, each choice about equally often."""
    rng = np.random.default_rng(0)
    columns = {
        name: [values[i] for i in rng.permutation(np.arange(count) % len(values))]
        for name, values in choices.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


DISTILLATION = combinations(
    30,
    alpha=(0.0, 0.1, 0.3, 0.5, 0.75, 1.0),
    topk=(None, 1, 4, 19, V, V + 5),
    add_tail=(True, False),
    is_clip=(None, 0.5, 2.0),
    threshold=(None, 0.9, 2.0),
    temperature=(1.0, 0.7, 2.0),
    agg=AGGS,
    microbatch=(B, 1, 2),
    mask=tuple(MASKS),
    scale=(1.0, 2.0, 8.0),
)


@pytest.mark.parametrize("chosen", DISTILLATION, ids=str)
def test_distillation_in_verls_spelling(chosen):
    """A support, clip, aggregation or temperature that is right alone and wrong together."""
    params = {name: chosen[name] for name in chosen if name not in ("mask", "scale")}
    mask = MASKS[chosen["mask"]]
    student, teacher, targets, old, sampler = arrays(len(str(chosen)), chosen["scale"])
    value, grad = by_hand.distillation(student, teacher, targets, mask, params)
    s = np.take_along_axis(
        by_hand.log_softmax(student / params["temperature"]), targets[..., None], -1
    )[..., 0]
    factor = 1.0
    if params["is_clip"] is not None:
        factor = by_hand.ratio(s, old, params["is_clip"])
    if params["threshold"] is not None:
        factor = factor * by_hand.ratio(old, sampler, params["threshold"])
    loss, weight = by_hand.aggregate(factor * value, mask, params["agg"], params["microbatch"])
    with jax.enable_x64(True):
        run = lambda z: distillation_loss(
            z, jnp.asarray(teacher), targets, mask, **logp, config=config
        )
        logp = {"old_logp": jnp.asarray(old), "sampler_logp": jnp.asarray(sampler)}
        config = {"source": "sdpo"} | params
        (ours, seen), ours_grad = jax.value_and_grad(run, has_aux=True)(jnp.asarray(student))
    np.testing.assert_allclose(ours, loss, rtol=1e-9, atol=1e-9)
    here = mask > 0
    np.testing.assert_allclose(
        seen["per_token_loss"][here], (factor * value)[here], rtol=1e-9, atol=1e-9
    )
    expected = (weight * factor)[..., None] * grad
    np.testing.assert_allclose(ours_grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_floor_of_the_tail_has_no_gradient(alpha):
    """A clamp that holds the value at 1e-7 and lets the gradient through."""
    rng = np.random.default_rng(4)
    student = np.full((1, 2, V), -19.0) + 0.1 * rng.normal(size=(1, 2, V))
    student[..., :2] = [0.3, 0.0]  # the other 18 hold 4e-8 together
    teacher = rng.normal(size=student.shape)
    params = {"alpha": alpha, "topk": 2, "add_tail": True}
    targets, mask = np.zeros((1, 2), int), np.ones((1, 2))
    assert (by_hand.softmax(student)[..., 2:].sum(-1) < by_hand.FLOOR).all()
    _, grad = by_hand.distillation(student, teacher, targets, mask, params)
    with jax.enable_x64(True):
        config = {"source": "sdpo", "agg": "seq-mean-token-sum"} | params
        loss = lambda z: distillation_loss(z, jnp.asarray(teacher), targets, mask, config=config)[0]
        ours = jax.grad(loss)(jnp.asarray(student))
    np.testing.assert_allclose(ours, grad, rtol=1e-9, atol=1e-10)


CLIPPED = combinations(
    16,
    beta=(0.0, 0.2, 0.5, 0.9, 1.0),
    top_k=(None, 1, 6, V),
    token_clip=(None, 0.05, 0.002, 1e-6),
    temperature=(1.0, 1.1),
    mask=("full", "ragged", "empty_row"),
)


@pytest.mark.parametrize("chosen", CLIPPED, ids=str)
def test_distillation_in_opsds_spelling(chosen):
    """A clip after the vocabulary sum, the student's top k, or a normaliser over rows."""
    params = {name: x for name, x in chosen.items() if name != "mask" and x is not None}
    mask = MASKS[chosen["mask"]]
    student, teacher, targets, _, _ = arrays(len(str(chosen)))
    labels = np.where(mask > 0, targets, -100)
    forms = {
        "alpha": chosen["beta"],
        "topk": chosen["top_k"],
        "teacher_side": True,
        "add_tail": False,
        "elem_clip": chosen["token_clip"] or np.inf,
        "temperature": chosen["temperature"],
    }
    value, grad = by_hand.distillation(student, teacher, targets, mask, forms)
    loss, weight = by_hand.aggregate(value, mask, "token-mean")
    with jax.enable_x64(True):
        run = lambda z: distillation_loss(
            z, jnp.asarray(teacher), labels, labels != -100, config=config
        )
        config = {"source": "opsd"} | params
        (ours, _), ours_grad = jax.value_and_grad(run, has_aux=True)(jnp.asarray(student))
    np.testing.assert_allclose(ours, loss, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours_grad, weight[..., None] * grad, rtol=1e-9, atol=1e-9)


POLICY = combinations(
    24,
    lo=(0.2, 0.1),
    hi=(0.28, 0.2),
    c=(3.0, 1.2, None),
    agg=(*AGGS, "dr_grpo", "grpo"),
    microbatch=(0, 1, 2),
    tis=(None, 2.0, 0.9),
    mask=tuple(MASKS),
)


@pytest.mark.parametrize("chosen", POLICY, ids=str)
def test_policy_gradient_in_verls_spelling(chosen):
    """Clips of both sides, the dual clip, sampler weights and every aggregation together."""
    mask = MASKS[chosen["mask"]]
    student, _, targets, old, sampler = arrays(len(str(chosen)))
    sampler = old + sampler - sampler.mean()
    rng = np.random.default_rng(5)
    old = old + 0.7 * rng.normal(size=old.shape)
    advantage = np.repeat(rng.normal(size=(B, 1)), T, 1)
    advantage[1] *= chosen["microbatch"] != 1  # 0 times an infinite dual clip must stay 0
    logp = np.take_along_axis(by_hand.log_softmax(student), targets[..., None], -1)[..., 0]
    dual = chosen["c"] or np.inf
    value, slope = by_hand.policy(logp, old, advantage, chosen["lo"], chosen["hi"], dual)
    factor = 1.0 if chosen["tis"] is None else by_hand.ratio(old, sampler, chosen["tis"])
    loss, weight = by_hand.aggregate(factor * value, mask, chosen["agg"], chosen["microbatch"])
    config = {name: chosen[name] for name in ("lo", "hi", "c", "agg", "microbatch")}
    config |= {"source": "grpo", "threshold": chosen["tis"]}
    with jax.enable_x64(True):
        run = lambda s: policy_gradient_loss(
            s, jnp.asarray(old), jnp.asarray(sampler), advantage[:, 0], mask, config=config
        )
        (ours, seen), ours_slope = jax.value_and_grad(run, has_aux=True)(jnp.asarray(logp))
    np.testing.assert_allclose(ours, loss, rtol=1e-9, atol=1e-9)
    here = mask > 0
    np.testing.assert_allclose(
        seen["per_token_loss"][here], (factor * value)[here], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(ours_slope, weight * factor * slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_estimators_in_verls_spelling(kind, spread):
    """A clamp that is missing, or that passes gradient, far from the reference policy."""
    rng = np.random.default_rng(2)
    logp, ref = -rng.exponential(2.0, (2, B, T))
    ref = logp + spread * rng.normal(size=(B, T))
    mask = MASKS["ragged"]
    value, slope = by_hand.penalty(logp, ref, "k3" if kind == "low_var_kl" else kind)
    loss, weight = by_hand.aggregate(value, mask, "token-mean")
    config = {"source": "kl", "kind": kind}
    with jax.enable_x64(True):
        run = lambda s: policy_gradient_loss(
            s, None, None, np.zeros(B), mask, config=config, ref_logp=jnp.asarray(ref)
        )
        (ours, seen), ours_slope = jax.value_and_grad(run, has_aux=True)(jnp.asarray(logp))
    np.testing.assert_allclose(ours, loss, rtol=1e-9)
    np.testing.assert_allclose(seen["per_token_loss"], value, rtol=1e-9)
    np.testing.assert_allclose(ours_slope, weight * slope, rtol=1e-9, atol=1e-12)
