"""Loss, per-token loss and gradient against recordings of the reference implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.objectives import (
    ObjectiveConfig,
    distillation_loss,
    importance,
    policy_gradient_loss,
)
from sdjax.objectives.advantages import group_advantage
from sdjax.objectives.topk import top_k_ids

from . import cases

DISTILLATION = (
    "sdpo_full",
    "sdpo_topk",
    "sdpo_sampled",
    "sdpo_is",
    "sdpo_rollout",
    "sdpo_partial",
    "sdpo_no",
    "sdpo_all",
    "sdpo_agg",
    "sdpo_identical",
    "sdpo_peaked",
    "sdpo_trust",
    "sdpo_token",
    "sdpo_temperature",
    "sdpo_micro",
    "trl_gkd",
    "trl_sdpo",
    "opsd_local",
    "opsd_upstream",
    "opsd_all",
    "opsd_compute",
    "rlcsd_repo_sdpo",
    "rlcsd_repo_opsd_clip",
    "rlcsd_repo_opsd_noclip",
)
POLICY = (
    "grpo_clip",
    "grpo_on",
    "grpo_agg",
    "grpo_tis",
    "grpo_all",
    "grpo_micro",
    "kl_penalty",
    "trl_policy",
    "formula_antisd",
)


def tolerance(name, dtype):
    if dtype == jnp.float64:
        return 1e-9
    if "peaked" in name:
        return 1e-5
    return 5e-6 if "sampled" in name or "policy_gradient" in name else 2e-6


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("prefixes", "run"), [(DISTILLATION, cases.run_distillation), (POLICY, cases.run_policy)]
)
def test_losses_equal_the_reference(shared_dir, prefixes, run, dtype):
    """A wrong sign, support, clip side, normaliser or gradient path in any objective."""
    found = cases.load(shared_dir, prefixes)
    assert len(found) >= 14
    with jax.enable_x64(dtype == "float64"):
        for case, arrays in found:
            try:
                cases.check(
                    case, arrays, run, jnp.dtype(dtype), tolerance(case["name"], jnp.dtype(dtype))
                )
            except AssertionError as error:
                raise AssertionError(f"{case['name']} ({dtype}): {error}") from None


def test_rlsd_case(shared_dir):
    """RLSD multiplies the advantage by clipped evidence whose direction is the reward's."""
    with jax.enable_x64(True):
        found = cases.load(shared_dir, ["rlcsd_repo_rlsd"])
        assert "rlcsd_repo_rlsd" in [case["name"] for case, _ in found]
        for case, arrays in found:
            if case["name"] == "rlcsd_repo_rlsd":
                cases.check(case, arrays, cases.run_policy, jnp.dtype("float64"), 1e-9)


def test_conciseness_reverse_kl_case(shared_dir):
    """The reference casts to float32 inside, so even its float64 run carries that rounding."""
    with jax.enable_x64(True):
        found = cases.load(shared_dir, ["opsdc_reverse_kl"])
        assert found
        for case, arrays in found:
            cases.check(case, arrays, cases.run_distillation, jnp.dtype("float64"), 1e-6)


def test_sampler_weights_and_their_metrics(shared_dir):
    """Truncation after instead of before the metrics, or a wrong normaliser of batch_normalize."""
    with jax.enable_x64(True):
        found = cases.load(shared_dir, ["tis_"])
        assert found
        for case, arrays in found:
            x, p = cases.inputs(arrays, jnp.float64), case["params"]
            trio = (x["old_log_probs"], x["rollout_log_probs"], x["response_mask"])
            weights = importance.rollout_weight(
                *trio, p["threshold"], p["level"], p["batch_normalize"]
            )
            np.testing.assert_allclose(
                weights, arrays["out_weights"], rtol=1e-9, err_msg=case["name"]
            )
            metrics = importance.importance_metrics(*trio, p["threshold"], p["level"])
            for key in metrics:
                np.testing.assert_allclose(
                    metrics[key],
                    arrays[f"out_metric_{key}"],
                    rtol=1e-7,
                    err_msg=f"{case['name']} {key}",
                )


def test_mismatch_metrics(shared_dir):
    """A swapped sign of the KL or a perplexity per batch instead of per response."""
    with jax.enable_x64(True):
        for _, arrays in cases.load(shared_dir, ["offpolicy"]):
            x = cases.inputs(arrays, jnp.float64)
            metrics = importance.offpolicy_metrics(
                x["old_log_probs"], x["rollout_log_probs"], x["response_mask"]
            )
            for key, value in metrics.items():
                np.testing.assert_allclose(
                    value, arrays[f"out_metric_{key}"], rtol=1e-9, err_msg=key
                )
            assert {f"out_metric_{key}" for key in metrics} == {
                k for k in arrays if k.startswith("out_metric_")
            }


def test_group_advantages(shared_dir):
    """ddof 0 instead of 1, or 0 for the lone member of a group."""
    found = cases.load(shared_dir, ["grpo_advantage"])
    assert found
    for case, arrays in found:
        reward = arrays["in_token_level_rewards"].sum(-1)
        ours = group_advantage(
            reward, np.array(case["params"]["uid"]), case["params"]["norm_by_std"]
        )
        expected = arrays["out_advantages"]
        np.testing.assert_allclose(ours[:, None] * arrays["in_response_mask"], expected, atol=1e-9)


def test_alignment_case(shared_dir):
    """Off by one between positions and the response tokens they predict, or T after the top-k."""
    with jax.enable_x64(True):
        for case, arrays in cases.load(shared_dir, ["sdpo_forward_alignment"]):
            p = case["params"]
            logits = arrays["in_sequence_logits"][:, -p["R"] - 1 : -1]
            logp = cases.sampled_logp(
                jnp.asarray(logits), jnp.asarray(arrays["in_responses"]), p["temperature"]
            )
            np.testing.assert_allclose(logp, arrays["out_log_probs"], atol=1e-9)
            ids = np.asarray(top_k_ids(jnp.asarray(logits), p["k"]))
            np.testing.assert_array_equal(np.sort(ids), np.sort(arrays["out_topk_indices"]))


def plain_call(case, x, logits):
    """(loss, metrics) with the documented arguments alone and the case's entry as the config."""
    mask, targets = cases.response_view(x)
    if "rollout_log_probs" in x:
        old, sampler = x["old_log_probs"], x["rollout_log_probs"]
        return policy_gradient_loss(old, old, sampler, -jnp.ones(len(old)), mask, config=case)
    logp = None if targets is None else cases.sampled_logp(logits, jnp.maximum(targets, 0))
    old, sampler = x.get("old_log_probs", x.get("ref_log_probs")), None
    if "rollout_is_weights" in x:
        current = jax.lax.stop_gradient(logp) if old is None else old
        sampler = current - jnp.log(jnp.where(mask > 0, x["rollout_is_weights"], 1.0))
    if "teacher_logits" not in x:
        return policy_gradient_loss(logp, old, sampler, x.get("advantages"), mask, config=case)
    mask = jnp.ones(logits.shape[:2]) if mask is None else mask
    if "self_distillation_mask" in x:
        mask = mask * x["self_distillation_mask"][:, None]
    sampler = old if sampler is None else sampler
    args = (logits, x["teacher_logits"], targets, mask)
    return distillation_loss(*args, sampler_logp=sampler, config=case)


PLAIN = ("sdpo_full_alpha0.5", "sdpo_is_clip2", "sdpo_rollout", "sdpo_partial", "trl_gkd_no")
PLAIN += ("trl_gkd_masked", "trl_policy", "opsd_local_top8", "grpo_clip", "grpo_tis", "kl_", "tis_")


def test_the_documented_arguments_are_enough(shared_dir):
    """docs/objectives.md promises a call for every group; a scorer has nothing else to go by."""
    with jax.enable_x64(True):
        found = cases.load(shared_dir, PLAIN)
        assert len(found) >= 17
        for case, arrays in found:
            x = cases.inputs(arrays, jnp.float64)
            run = lambda z, case=case, x=x: plain_call(case, x, z)
            if "out_weights" in arrays:
                actual, expected = run(None)[1]["rollout_weights"], arrays["out_weights"]
            else:
                (loss, _), grad = jax.value_and_grad(run, has_aux=True)(x["student_logits"])
                np.testing.assert_allclose(
                    loss, arrays["out_loss"], atol=1e-9, err_msg=case["name"]
                )
                actual, expected = grad, arrays["out_grad_student_logits"]
            np.testing.assert_allclose(actual, expected, atol=1e-9, err_msg=case["name"])


def test_defaults_and_spellings_of_the_references():
    """A parameter that a case leaves out has the value of the reference's function."""
    read = ObjectiveConfig.from_reference
    assert read("opsd_masked_row", {"beta": 0.5}).temperature == 1.0
    assert read("opsd_local", {"top_k": 8}).support == "teacher_topk"
    assert read("trl_gkd_sum", {"reduction": "sum"}).norm_n == 1.0
    assert read("trl_gkd", {"reduction": "batchmean"}).loss_agg == "labels-mean"
    assert read("trl_sdpo_sampled_token", {"k": None}).support == "sampled"
    assert read("trl_policy_dr_grpo", {"loss_type": "dr_grpo"}).loss_agg == "rows-fixed"
    assert read("grpo_micro1", {"microbatch": 1}).microbatch == 1
    assert read("grpo_no_dual", {"c": None}).dual_clip == float("inf")


@pytest.mark.parametrize("source", ["sdpoo", "unheard_of"])
def test_unknown_reference_source_is_named(source):
    with pytest.raises(ValueError, match=source):
        ObjectiveConfig.from_reference(source, {})


def test_unknown_reference_parameter_is_named():
    with pytest.raises(ValueError, match="alhpa"):
        ObjectiveConfig.from_reference("sdpo", {"alhpa": 1.0})
