"""From per-token losses to one number: each response's weight in the sum.

Every aggregation of METHODS 1.3 is sum_i w_i sum_t M_it l_it with a weight per response, so the
host computes the weights once over the whole mini-batch and micro-batches and devices only add.
The functions take numpy or jax arrays (`xp`) and import neither's device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LOSS_AGGS = {
    "rows-incl-masked": "mean over all rows of the row's mean; a fully masked row counts as 0",
    "seq-mean-token-mean": "mean over rows with a valid token of the row's mean",
    "seq-mean-token-sum": "mean over rows with a valid token of the row's sum",
    "seq-mean-token-sum-norm": "sum / norm_n; norm_n = 0 takes the padded length (Dr.GRPO)",
    "token-mean": "sum / number of valid tokens, at least 1",
    "labels-mean": "as token-mean; without a mask, sum / number of rows (TRL's GKD)",
    "labels-mean-unclamped": "as labels-mean, but NaN without a valid token (OPSD)",
    "rows-fixed": "sum / (rows * norm_n); norm_n = 0 takes the padded length (TRL's dr_grpo)",
    "row-sum-mean": "sum / number of rows (GKD without labels)",
}


def row_weights(
    counts_B: Any, loss_agg: str, *, norm_n: float = 0.0, padded_len: int = 0, xp: Any = np
) -> Any:
    """Weight of each row, given its number of valid tokens, so that the loss is sum w_i sum_t m l.

    Raises ValueError for an unknown `loss_agg` (see LOSS_AGGS) and when a fixed divisor is missing.
    """
    if loss_agg not in LOSS_AGGS:
        raise ValueError(
            f"objective.loss_agg={loss_agg!r} is unknown: use one of {', '.join(LOSS_AGGS)}"
        )
    rows = counts_B.shape[0]
    ones = xp.ones_like(counts_B)
    valid = xp.where(counts_B > 0, ones, 0 * ones)
    valid_rows = xp.maximum(valid.sum(), 1)
    if loss_agg == "rows-incl-masked":
        return ones / xp.maximum(counts_B, 1) / rows
    if loss_agg == "seq-mean-token-mean":
        return valid / (counts_B + 1e-8) / valid_rows
    if loss_agg in ("token-mean", "labels-mean", "labels-mean-unclamped"):
        return ones / xp.maximum(counts_B.sum(), 1)
    if loss_agg == "seq-mean-token-sum":
        return ones / valid_rows
    if loss_agg == "row-sum-mean":
        return ones / rows
    length = norm_n or padded_len
    if not length:
        raise ValueError(f"objective.loss_agg={loss_agg!r} needs objective.norm_n, the divisor")
    return ones / length / (rows if loss_agg == "rows-fixed" else 1)


def grouped_row_weights(
    counts_B: Any, loss_agg: str, microbatch: int, *, xp: Any = np, **kwargs
) -> Any:
    """As `row_weights` within every `microbatch` consecutive rows, then averaged over the groups.

    This is what accumulating per-micro-batch normalised losses computes (METHODS 1.3); 0 means one
    group. A smaller last group counts by its share of the rows.
    """
    rows = counts_B.shape[0]
    if not microbatch or microbatch >= rows:
        return row_weights(counts_B, loss_agg, xp=xp, **kwargs)
    parts = [counts_B[start : start + microbatch] for start in range(0, rows, microbatch)]
    weights = [
        row_weights(part, loss_agg, xp=xp, **kwargs) * (part.shape[0] / rows) for part in parts
    ]
    return xp.concatenate(weights)


def position_window(position: Any, skip_first: int, prefix_len: int) -> Any:
    """Whether token t of a response is distilled: skip_first <= t < prefix_len (0: no end)."""
    inside = position >= skip_first
    return inside & (position < prefix_len) if prefix_len else inside


def response_weights(
    lengths: np.ndarray,
    has_teacher: np.ndarray,
    loss_agg: str = "rows-incl-masked",
    *,
    norm_n: float = 0.0,
    padded_len: int = 0,
    skip_first: int = 0,
    prefix_len: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (policy term, distillation term) per response of the *whole* mini-batch, float32.

    The distillation term's mask is m * d inside the position window, so responses without a teacher
    get weight 0 there and, under "rows-incl-masked", still count in the denominator.
    On several hosts pass the lengths of all hosts and keep your own rows.
    """
    lengths = np.asarray(lengths, np.float64)
    end = np.minimum(lengths, prefix_len) if prefix_len else lengths
    distilled = np.maximum(end - skip_first, 0) * np.asarray(has_teacher, np.float64)
    kwargs = {"norm_n": norm_n, "padded_len": padded_len or int(lengths.max(initial=0))}
    policy = row_weights(lengths, loss_agg, **kwargs) * (lengths > 0)
    distill = row_weights(distilled, loss_agg, **kwargs) * (distilled > 0)
    return policy.astype(np.float32), distill.astype(np.float32)
