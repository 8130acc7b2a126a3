"""The formulas of METHODS 1.1 to 2 in numpy with their gradients by hand; nothing of sdjax.

Written from the closed forms, not from the code under test: divergences through dD/dP of each
category, supports through dP/dz, policy terms through the branch that wins.
"""

import numpy as np

FLOOR = -np.expm1(-1e-7)  # the least that a tail bucket holds


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def terms_and_slopes(P, Q, alpha):
    """Terms d_c of D_alpha and dD/dP_c, exact (not up to a constant), for categories [..., C]."""
    if alpha == 0:
        return Q * np.log(Q / P), -Q / P
    if alpha == 1:
        return P * np.log(P / Q), np.log(P / Q) + 1
    M = (1 - alpha) * P + alpha * Q
    terms = (1 - alpha) * P * np.log(P / M) + alpha * Q * np.log(Q / M)
    return terms, (1 - alpha) * np.log(P / M)


def largest(z, k):
    """Mask [..., V] of the k largest entries (no ties expected)."""
    k = min(k, z.shape[-1])
    return z >= np.sort(z, -1)[..., -k, None]


def token_divergence(z_student, z_teacher, alpha, inside, tail, elem_clip=np.inf):
    """(D, dD/dz) per token on the support `inside` [..., V].

    `tail` True adds a bucket, False renormalises, None takes the whole vocabulary as it is.
    """
    p, q = softmax(z_student), softmax(z_teacher)
    P, Q = np.where(inside, p, 1.0), np.where(inside, q, 1.0)
    if tail is False:
        mass_p, mass_q = ((x * inside).sum(-1, keepdims=True) for x in (p, q))
        P, Q = np.where(inside, p / mass_p, 1.0), np.where(inside, q / mass_q, 1.0)
    d, g = terms_and_slopes(P, Q, alpha)
    g = np.where(inside & (d <= elem_clip), g, 0.0)
    value = (np.minimum(d, elem_clip) * inside).sum(-1)
    if tail is False:
        share = P * inside
        return value, share * (g - (share * g).sum(-1, keepdims=True))
    if tail:
        rest_p, rest_q = ((x * ~inside).sum(-1) for x in (p, q))
        d_tail, g_tail = terms_and_slopes(
            np.maximum(rest_p, FLOOR), np.maximum(rest_q, FLOOR), alpha
        )
        g_tail = np.where((rest_p > FLOOR) & (d_tail <= elem_clip), g_tail, 0.0)
        value = value + np.minimum(d_tail, elem_clip)
        g = g - inside * g_tail[..., None]  # P_tail = 1 - sum of the others
    return value, p * (g - (p * g).sum(-1, keepdims=True))


def distillation(z_student, z_teacher, targets, mask, params):
    """(loss, gradient [B, T, V]) of each token by itself; `params` in verl's spelling."""
    tau = params.get("temperature", 1.0)
    z, t = z_student / tau, z_teacher / tau
    alpha, k = params["alpha"], params.get("topk")
    everything = np.ones(z.shape, bool)
    if not params.get("full_logit", True):
        s, r = (np.take_along_axis(log_softmax(x), targets[..., None], -1)[..., 0] for x in (z, t))
        hot = np.eye(z.shape[-1])[targets]
        value, grad = (s - r) * s, (s - r)[..., None] * (hot - softmax(z))
    elif k is None:
        clip = params.get("elem_clip", np.inf)
        value, grad = token_divergence(z, t, alpha, everything, None, clip)
    else:
        inside = largest(t if params.get("teacher_side") else z, k)
        value, grad = token_divergence(
            z, t, alpha, inside, params["add_tail"], params.get("elem_clip", np.inf)
        )
    return value, grad / tau


def ratio(new, old, cap):
    return np.minimum(np.exp(np.clip(new - old, -20, 20)), cap)


def aggregate(values, mask, name, microbatch=0, norm=0):
    """(loss, weight of every entry) of METHODS 1.3, from its text."""
    if microbatch and microbatch < len(mask):
        parts = [slice(i, i + microbatch) for i in range(0, len(mask), microbatch)]
        done = [aggregate(values[s], mask[s], name, 0, norm) for s in parts]
        share = [len(mask[s]) / len(mask) for s in parts]
        loss = sum(f * d[0] for f, d in zip(share, done, strict=True))
        return loss, np.concatenate([f * d[1] for f, d in zip(share, done, strict=True)])
    n = mask.sum(-1, keepdims=True)
    alive = (n > 0).astype(float)
    weight = {
        "token-mean": mask / max(1.0, mask.sum()),
        "seq-mean-token-sum": mask * alive / max(1.0, alive.sum()),
        "seq-mean-token-mean": mask * alive / (n + 1e-8) / max(1.0, alive.sum()),
        "seq-mean-token-sum-norm": mask / (norm or mask.shape[-1]),
        "grpo": mask / np.maximum(1.0, n) / len(mask),
        "dr_grpo": mask / (len(mask) * (norm or mask.shape[-1])),
    }[name]
    return (weight * values).sum(), weight


def policy(s, old, advantage, low, high, dual):
    """(per-token loss, its derivative by s): the branch that wins, one case at a time."""
    value, slope = np.zeros_like(s), np.zeros_like(s)
    for at in np.ndindex(s.shape):
        r, A = np.exp(np.clip(s[at] - old[at], -20, 20)), advantage[at]
        clipped = min(max(r, 1 - low), 1 + high)
        value[at], slope[at] = -A * r, -A * r
        if -A * clipped > -A * r:
            value[at], slope[at] = -A * clipped, 0.0
        if A < 0 and value[at] > -dual * A:
            value[at], slope[at] = -dual * A, 0.0
    return value, slope


def penalty(s, ref, kind):
    """(value, derivative by s) of the KL estimators."""
    x = s - ref
    if kind in ("k1", "kl"):
        return x, np.ones_like(x)
    if kind == "abs":
        return np.abs(x), np.sign(x)
    if kind in ("k2", "mse"):
        return x**2 / 2, x
    d = np.clip(-x, -20, 20)
    value = np.exp(d) - d - 1
    open_ = (np.abs(x) < 20) & (value < 10)
    return np.minimum(value, 10), np.where(open_, 1 - np.exp(d), 0.0)
