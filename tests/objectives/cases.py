"""Runs the recorded reference cases through the public losses, at the precision asked for."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.objectives import ObjectiveConfig, distillation_loss, policy_gradient_loss


def load(folder, prefixes):
    """(case, arrays) of the manifest whose names start with one of `prefixes` and have a loss."""
    manifest = json.loads((folder / "fixtures" / "manifest.json").read_text())
    out = []
    for case in manifest["numeric_cases"]:
        if case["name"].startswith(tuple(prefixes)):
            with np.load(folder / "fixtures" / case["file"]) as data:
                out.append((case, {key: data[key] for key in data.files}))
    return out


def inputs(arrays, dtype):
    """The in_* arrays: floats in `dtype`, integers as int32."""
    out = {}
    for key, value in arrays.items():
        if key.startswith("in_"):
            kind = dtype if np.issubdtype(value.dtype, np.floating) else np.int32
            out[key[3:]] = jnp.asarray(value.astype(kind))
    return out


def response_view(x):
    """(mask, targets) of a case, whichever way its reference marks valid tokens."""
    if "labels" in x:
        return (x["labels"] != -100), x["labels"]
    mask = x.get("response_mask", x.get("loss_mask"))
    return mask, x.get("tokens")


def sampled_logp(logits, targets, temperature=1.0):
    logp = jax.nn.log_softmax(logits / temperature, -1)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


def run_distillation(case, x, logits):
    """(loss, metrics) of a distillation case as a function of the student's logits."""
    config = ObjectiveConfig.from_reference(case["name"], case["params"])
    mask, targets = response_view(x)
    teacher = x.get("teacher_logits")
    if "ref_logits" in x:
        mix = case["params"]["mix"]
        on_teacher = x["student_logits_on_teacher_prompt"]
        teacher = (1 - mix) * x["ref_logits"] + mix * on_teacher
    if "student_sequence_logits" in x:
        student_prompt, teacher_prompt = case["params"]["Ps"], case["params"]["Pt"]
        logits = logits[:, student_prompt - 1 : -1]
        teacher = x["teacher_sequence_logits"][:, teacher_prompt - 1 : -1]
        mask, targets = mask[:, student_prompt:], targets[:, student_prompt:]
    if logits.ndim == 2:
        logits, teacher = logits[None], teacher[None]
    return distillation_loss(
        logits,
        teacher,
        targets,
        mask,
        config=config,
        old_logp=x.get("old_log_probs"),
        has_teacher=x.get("self_distillation_mask"),
        rollout_weights=x.get("rollout_is_weights"),
    )


def run_policy(case, x, logits):
    """(loss, metrics) of a policy-gradient or KL-penalty case as a function of the logits."""
    config = ObjectiveConfig.from_reference(case["name"], case["params"])
    mask, targets = response_view(x)
    logp = sampled_logp(logits, targets)
    advantage = x.get("advantages", x.get("seq_advantages", jnp.zeros_like(logp)))
    teacher = x.get("teacher_logits")
    return policy_gradient_loss(
        logp,
        x.get("old_log_probs"),
        None,
        advantage,
        mask,
        config=config,
        ref_logp=x.get("ref_log_probs"),
        teacher_logp=None if teacher is None else sampled_logp(teacher, targets),
        rollout_weights=x.get("rollout_is_weights"),
    )


def check(case, arrays, run, dtype, tolerance):
    """Asserts loss, gradient and per-token loss of one case."""
    x = inputs(arrays, dtype)
    name = "student_sequence_logits" if "student_sequence_logits" in x else "student_logits"
    (loss, metrics), grad = jax.value_and_grad(lambda z: run(case, x, z), has_aux=True)(x[name])
    assert loss.dtype == dtype
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    close(loss, arrays["out_loss"])
    close(grad, arrays[f"out_grad_{name}"])
    if "out_per_token_loss" in arrays:
        close(metrics["per_token_loss"], arrays["out_per_token_loss"])
    if "out_loss_mask" in arrays:
        close(metrics["loss_mask"], arrays["out_loss_mask"])
    if case["name"].startswith("grpo"):
        for key in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"):
            close(metrics[key], arrays[f"out_metric_{key}"])
