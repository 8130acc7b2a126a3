"""The chunked head against recorded reference cases and against whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import head
from sdjax.objectives import ObjectiveConfig, Slots, aggregation, token_loss
from tests.objectives import cases
from tests.step.small import compiled

CASES = (
    "sdpo_full_alpha0.5",
    "sdpo_topk8_tail_alpha0.5",
    "sdpo_topk8_renorm_alpha1",
    "sdpo_sampled",
    "sdpo_is_clip2",
    "sdpo_partial",
    "sdpo_peaked_tail_alpha0.5",
    "opsd_local_top8_beta0",
    "opsd_upstream_clip0.05_beta0",
)


def through_head(logits, teacher_logits, slots, config, chunk):
    """Loss and gradient of the logits, taken as hidden states of a head that is the identity."""
    eye = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    teacher = head.TeacherHead(hidden=teacher_logits, weight=eye)
    used = jnp.asarray(logits.shape[1])

    def loss(hidden, weight):
        return head.head_loss(hidden, weight, teacher, slots, used, config.knobs(), config, chunk)

    return compiled(jax.value_and_grad(loss, (0, 1), has_aux=True), logits, eye)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recorded_cases_through_the_chunked_head(shared_dir, dtype):
    """A chunk boundary, a padded chunk or the hand-made backward pass that changes the numbers."""
    with jax.enable_x64(dtype == "float64"):
        for case, arrays in cases.load(shared_dir, CASES):
            x = cases.inputs(arrays, jnp.dtype(dtype))
            config = ObjectiveConfig.from_reference(case["name"], case["params"])
            mask, targets = cases.response_view(x)
            mask = mask.astype(dtype)
            if "self_distillation_mask" in x:
                mask = mask * x["self_distillation_mask"][:, None]
            rows = aggregation.row_weights(
                mask.sum(-1), config.loss_agg, padded_len=mask.shape[1], xp=jnp
            )
            slots = Slots(
                targets=jnp.maximum(targets if targets is not None else 0, 0),
                weight=mask * rows[:, None],
                distill_weight=mask * rows[:, None],
                old_logp=x.get("old_log_probs"),
                rollout_weight=x.get("rollout_is_weights"),
            )
            (loss, _), (grad, _) = through_head(
                x["student_logits"], x["teacher_logits"], slots, config, 3
            )
            loose = 1e-5 if "peaked" in case["name"] else 5e-6
            tolerance = 1e-9 if dtype == "float64" else loose
            kwargs = {"rtol": tolerance, "atol": tolerance, "err_msg": case["name"]}
            np.testing.assert_allclose(loss, arrays["out_loss"], **kwargs)
            np.testing.assert_allclose(grad, arrays["out_grad_student_logits"], **kwargs)


def random_problem(seed=0, B=2, R=6, V=40, D=8):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (B, R, D))
    other = jax.random.normal(keys[1], (B, R, D))
    weight = jax.random.normal(keys[2], (V, D))
    targets = jax.random.randint(keys[3], (B, R), 0, V)
    slot_weight = jax.random.uniform(keys[4], (B, R))
    slots = Slots(targets=targets, weight=slot_weight, distill_weight=slot_weight)
    return hidden, other, weight, slots


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_of_hidden_and_weight_equal_autodiff(chunk):
    """A transposed or twice counted weight gradient."""
    hidden, other, weight, slots = random_problem()
    config = ObjectiveConfig(distillation_topk=5)
    teacher = head.TeacherHead(hidden=other, weight=2 * weight)

    def chunked(hidden, weight):
        used = jnp.asarray(hidden.shape[1])
        args = (teacher, slots, used, config.knobs(), config, chunk)
        return 3.0 * head.head_loss(hidden, weight, *args)[0]

    def whole(hidden, weight):
        logits = hidden @ weight.T
        target = head.teacher_logits(teacher)
        return 3.0 * token_loss(logits, target, slots, config, config.knobs())[0].sum()

    expected = jax.value_and_grad(whole, (0, 1))(hidden, weight)
    actual = compiled(jax.value_and_grad(chunked, (0, 1)), hidden, weight)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [40, 41, 80])
def test_blocks_of_the_vocabulary_give_the_gradients_of_the_whole(vocab, monkeypatch):
    """A block that is lost, counted twice or put elsewhere, the short last one above all."""
    monkeypatch.setattr(head, "VOCAB_BLOCK", 20)
    hidden, _, weight, _ = random_problem(V=vocab)
    keys = jax.random.split(jax.random.key(1))
    dlogits = jax.random.normal(keys[0], (*hidden.shape[:2], vocab))
    dweight = jax.random.normal(keys[1], (1, *weight.shape))
    args = (dlogits, hidden, weight, dweight)
    expected = head._add_gradients_whole(*args)
    actual = compiled(head._add_gradients, *args)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_the_logits_gradient_is_multiplied_by_blocks():
    """A choice of the platform that leaves the loop over blocks out where it was meant."""
    hidden, other, weight, slots = random_problem(V=2 * head.VOCAB_BLOCK)
    dweight = jnp.zeros((1, *weight.shape))
    dlogits = jnp.zeros((*hidden.shape[:2], len(weight)))
    args = (dlogits, hidden, weight, dweight)
    whole = f"tensor<{len(weight)}x{weight.shape[1]}xf32>"
    products = [
        line
        for line in jax.jit(head._add_gradients).lower(*args).as_text().splitlines()
        if "dot_general" in line
    ]
    assert products and not any(whole in line for line in products)


def test_trust_region_teacher_mixes_logits():
    """Mixing probabilities, or hidden states, instead of logits."""
    hidden, other, weight, _ = random_problem()
    teacher = head.TeacherHead(
        hidden=other, weight=weight, other_hidden=hidden, other_weight=2 * weight, mix=0.3
    )
    expected = 0.7 * (other @ weight.T) + 0.3 * (hidden @ (2 * weight).T)
    np.testing.assert_allclose(head.teacher_logits(teacher), expected, rtol=1e-5, atol=1e-5)


def test_slots_beyond_those_used_are_not_computed():
    """An empty tail that costs time, or garbage there that reaches the sum."""
    hidden, other, weight, slots = random_problem()
    config = dataclasses.replace(ObjectiveConfig(), pg_coef=1.0, distill_coef=0.0)
    slots = slots.replace(advantage=jnp.ones_like(slots.weight))
    short = jax.tree.map(lambda x: x.at[:, 4:].set(0), slots)
    hidden = hidden.at[:, 4:].set(jnp.nan)
    args = (config.knobs(), config, 2)
    loss, seen = head.head_loss(hidden, weight, None, short, jnp.asarray(4), *args)
    assert np.isfinite(loss) and not seen["student_logp"][:, 4:].any()
    cut = jax.tree.map(lambda x: x[:, :4], slots)
    expected = head.head_loss(hidden[:, :4], weight, None, cut, jnp.asarray(4), *args)[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
