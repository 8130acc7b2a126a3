"""Other codebases' names for the fields of ObjectiveConfig, and their defaults.

`ObjectiveConfig.from_reference(source, params)` takes a source (SOURCES; the name of a case that
begins with one, such as "sdpo_topk8_tail_alpha1", works too) and parameters in that codebase's own
spelling; what is not named has the default of that codebase's loss function. Values that do not
concern the objective (prompt lengths, EMA rates) are passed over by name; an unknown parameter is
an error.
"""

from __future__ import annotations

import math
from typing import Any

_BARE = {"is_clip": math.inf, "rollout_is_clip": math.inf}
_DISTILL = _BARE | {"support": "full", "pg_coef": 0.0, "distill_coef": 1.0}
_POLICY = _BARE | {"pg_coef": 1.0, "distill_coef": 0.0, "loss_agg": "token-mean"}
_RLCSD_POLICY = _POLICY | {"clip_high": 0.2, "dual_clip": math.inf}

# What each codebase does when a parameter is not named. Longest matching prefix wins.
SOURCES: dict[str, dict[str, Any]] = {
    "sdpo": _DISTILL | {"loss_agg": "token-mean"},
    "sdpo_rollout": _DISTILL | {"loss_agg": "token-mean", "rollout_is_clip": 2.0},
    "grpo": _POLICY,
    "grpo_tis": _POLICY | {"rollout_is_clip": 2.0},
    "kl": _POLICY | {"pg_coef": 0.0, "kl_coef": 1.0},
    "tis": _POLICY | {"rollout_is_clip": 2.0},
    "offpolicy": _POLICY,
    "trl_gkd": _DISTILL | {"loss_agg": "labels-mean"},
    "trl_sdpo": _DISTILL | {"loss_agg": "rows-incl-masked", "add_tail": False},
    "trl_policy": _POLICY | {"dual_clip": math.inf, "loss_agg": "rows-incl-masked"},
    "opsd": _DISTILL | {"loss_agg": "labels-mean-unclamped"},
    "opsdc": _DISTILL | {"alpha": 1.0, "loss_agg": "token-mean"},
    "rlcsd_repo_sdpo": _DISTILL | {"loss_agg": "token-mean", "is_clip": 2.0},
    "rlcsd_repo_opsd": _DISTILL | {"loss_agg": "token-mean", "alpha": 0.0},
    "rlcsd_repo_rlsd": _RLCSD_POLICY | {"mod": "mult_rlsd"},
    "formula_antisd": _RLCSD_POLICY | {"mod": "anti_phi"},
}

# spelling -> field
SPELLINGS = {
    "alpha": "alpha",
    "beta": "alpha",
    "distill_alpha": "alpha",
    "distill_beta": "alpha",
    "add_tail": "add_tail",
    "tail": "add_tail",
    "distillation_add_tail": "add_tail",
    "is_clip": "is_clip",
    "distillation_is_clip": "is_clip",
    "temperature": "temperature",
    "microbatch": "microbatch",
    "micro_batch": "microbatch",
    "micro": "microbatch",
    "lo": "clip_low",
    "eps_lo": "clip_low",
    "epsilon_low": "clip_low",
    "clip_ratio_low": "clip_low",
    "hi": "clip_high",
    "eps_hi": "clip_high",
    "epsilon_high": "clip_high",
    "clip_ratio_high": "clip_high",
    "c": "dual_clip",
    "dual_c": "dual_clip",
    "clip_ratio_c": "dual_clip",
    "threshold": "rollout_is_clip",
    "tis_clip": "rollout_is_clip",
    "rollout_is_threshold": "rollout_is_clip",
    "level": "rollout_is_level",
    "rollout_is": "rollout_is_level",
    "batch_normalize": "rollout_is_normalize",
    "rollout_is_batch_normalize": "rollout_is_normalize",
    "token_clip": "elem_clip",
    "jsd_token_clip": "elem_clip",
    "elem_clip": "elem_clip",
    "tok_clip": "token_clip",
    "kind": "kl_estimator",
    "kl_penalty": "kl_estimator",
    "norm_by_std": "norm_adv_by_std",
    "norm_std": "norm_adv_by_std",
    "norm_adv_by_std_in_grpo": "norm_adv_by_std",
    "lam": "mod_lam",
    "epsilon_w": "mod_eps_w",
    "norm_n": "norm_n",
    "loss_scale_factor": "norm_n",
    "max_completion_length": "norm_n",
    "skip_first": "skip_first",
    "num_loss_tokens_to_skip": "skip_first",
    "prefix_len": "prefix_len",
    "support": "support",
    "mod": "mod",
    "kl_coef": "kl_coef",
    "c_kl": "kl_coef",
    "c_pg": "pg_coef",
    "c_d": "distill_coef",
    "c_H": "entropy_coef",
    "dir": "direction",
}
AGG_SPELLINGS = {
    "rows_incl_masked": "rows-incl-masked",
    "grpo": "rows-incl-masked",
    "rows_valid": "seq-mean-token-mean",
    "tokens": "token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "luspo": "token-mean",
    "cispo": "token-mean",
    "sapo": "token-mean",
    "dr_grpo": "rows-fixed",
    "batchmean": "labels-mean",
}
REDUCTIONS = {
    "batchmean": {},
    "sum": {"loss_agg": "seq-mean-token-sum-norm", "norm_n": 1.0},
}
ESTIMATOR_SPELLINGS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
TOPK_NAMES = ("topk", "k", "top_k", "top_k_distill", "top_k_loss", "distillation_topk")
AGG_NAMES = ("agg", "loss_agg", "loss_agg_mode", "loss_type", "norm")
FULL_NAMES = ("full_logit", "full_logit_distill", "full_logit_distillation")
# of the case, not of the objective: prompt lengths, teacher weights, groups
PASSED_OVER = ("Ps", "Pt", "P", "R", "mix", "rates", "rate", "decay", "uid")
INF_WHEN_NONE = ("is_clip", "elem_clip", "token_clip", "dual_clip", "rollout_is_clip")


def fields(source: str, params: dict[str, Any]) -> dict[str, Any]:
    """Fields of ObjectiveConfig for `params` in the spelling of `source`.

    Raises ValueError for an unknown source or parameter, listing the known ones.
    """
    origin = _origin(source)
    out = dict(SOURCES[origin])
    for name, value in params.items():
        if name in PASSED_OVER:
            continue
        out |= _translate(origin, name, value)
    if "sampled" in source or "policy_gradient" in source:
        out["support"] = "sampled"
    if source.endswith("nolabels"):
        out["loss_agg"] = "row-sum-mean"
    if out.get("support") == "sampled":
        out["alpha"] = params.get("alpha", 1.0)
    return out


def _origin(source: str) -> str:
    """The longest known source that `source` begins with."""
    known = [name for name in SOURCES if source == name or source.startswith(f"{name}_")]
    if not known:
        raise ValueError(f"reference source {source!r} is unknown: use {', '.join(SOURCES)}")
    return max(known, key=len)


def _translate(origin: str, name: str, value: Any) -> dict[str, Any]:
    """One parameter as fields."""
    if name in TOPK_NAMES:
        if not value:
            return {"support": "full"}
        teacher = origin in ("opsd", "rlcsd_repo_opsd")
        tail = {"add_tail": False} if origin == "opsd" else {}
        return {
            "support": "teacher_topk" if teacher else "student_topk",
            "distillation_topk": int(value),
        } | tail
    if name in FULL_NAMES:
        return {} if value else {"support": "sampled"}
    if name in AGG_NAMES:
        return {"loss_agg": AGG_SPELLINGS.get(value, value)}
    if name in ("num_items_in_batch", "num_items"):
        return {"loss_agg": "seq-mean-token-sum-norm", "norm_n": float(value)} if value else {}
    if name == "reduction" and value in REDUCTIONS:
        return REDUCTIONS[value]
    if name == "mode":
        return {} if "sampled" not in value else {"support": "sampled"}
    if name in ("epsilon", "clip", "cliprange"):
        return {"clip_low": value, "clip_high": value}
    if name not in SPELLINGS:
        raise ValueError(
            f"parameter {name!r} is not known of {origin}: use {', '.join(sorted(SPELLINGS))}"
        )
    target = SPELLINGS[name]
    if target in INF_WHEN_NONE and (value is None or (target == "elem_clip" and value == 0)):
        value = math.inf
    if target == "kl_estimator":
        value = ESTIMATOR_SPELLINGS.get(value, value)
    return {target: value}
