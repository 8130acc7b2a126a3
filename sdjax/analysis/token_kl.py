"""Where the teacher disagrees with the student: divergence by the response token's surface form.

Appendix B.6 and Table 6 of the paper: the divergence at each token the student wrote, averaged over
tokens that read the same, relative to the mean over all tokens. The direction is not stated there;
`response_kl` is KL(student || teacher) over the whole vocabulary. Frequent means `min_count` times.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import html
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.analysis import tables
from sdjax.analysis.epistemic import WORDS
from sdjax.models import decoder

MIN_COUNT = 50  # the paper has 1642 "frequent" tokens without saying from how many on
BUCKET = 128  # lengths are padded to multiples, so that few shapes are compiled
CHUNK = 64  # response tokens whose logits exist at the same time


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One surface form: how often, its mean divergence, and that relative to the corpus mean."""

    token: str
    count: int
    mean: float
    ratio: float


def by_token(
    divergence: Sequence[float] | np.ndarray, tokens: Sequence[str], min_count: int = MIN_COUNT
) -> list[TokenRow]:
    """Rows by falling mean divergence; `divergence` [N] belongs to `tokens` [N] over all responses.

    Forms with and without a leading space or capital are different, as in the paper's table. Raises
    ValueError when the lengths differ or a divergence is not finite.
    """
    values = np.asarray(divergence, np.float64)
    if values.shape != (len(tokens),):
        raise ValueError(f"divergence has shape {values.shape}, but there are {len(tokens)} tokens")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.sum(~np.isfinite(values))} divergences are not finite")
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for token, value in zip(tokens, values, strict=True):
        groups[token].append(value)
    mean = values.mean() if len(values) else np.nan
    rows = [
        TokenRow(token, len(group), float(np.mean(group)), float(np.mean(group) / mean))
        for token, group in groups.items()
        if len(group) >= min_count
    ]
    return sorted(rows, key=lambda row: (-row.mean, row.token))


def epistemic_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The rows whose form is one of the ten words, apart from case and outer spaces."""
    return [row for row in rows if row.token.strip().lower() in WORDS]


def table(rows: Sequence[TokenRow], top: int = 20) -> str:
    """Markdown of the epistemic forms and of the `top` forms of all."""
    cells = lambda part: [
        [f"`{row.token!r}`", str(row.count), tables.number(row.mean, 4), f"{row.ratio:.1f}x"]
        for row in part
    ]
    header = ["token", "count", "mean divergence (nats)", "over the mean of all tokens"]
    parts = ["Epistemic words:\n", tables.markdown(header, cells(epistemic_rows(rows)))]
    parts += [f"All tokens, the first {top}:\n", tables.markdown(header, cells(rows[:top]))]
    return "\n".join(parts)


def response_kl(
    params: Any,
    teacher_params: Any,
    cfg: Any,
    prompt: np.ndarray,
    teacher_prompt: np.ndarray,
    response: np.ndarray,
    temperature: float = 1.0,
) -> np.ndarray:
    """KL(student || teacher) in nats at each token of one response, float32 [R].

      sum_v p_v (log p_v - log q_v),  p given (prompt, y_<t),  q given (teacher prompt, y_<t)

    One response at a time and the logits of a few tokens at a time, for analysis; training has its
    own chunked and packed computation (`sdjax.step`).
    """
    n = len(response)
    places = np.arange(-(-n // CHUNK) * CHUNK)
    both = []
    for model, start in ((params, prompt), (teacher_params, teacher_prompt)):
        row = np.concatenate([start, response]).astype(np.int32)
        segment = np.zeros(-(-len(row) // BUCKET) * BUCKET, np.int32)
        segment[: len(row)] = 1
        tokens = np.zeros_like(segment)
        tokens[: len(row)] = row
        index = np.minimum(len(start) - 1 + places, len(row) - 1).astype(np.int32)
        both.append((model, tokens[None], segment[None], index))
    values = _kl(cfg, temperature, *both)
    return np.asarray(values)[:n]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kl(cfg: Any, temperature: float, student: tuple, teacher: tuple) -> jax.Array:
    """KL at each slot [R], R a multiple of CHUNK; a side is (params, tokens, segments, index)."""

    def hidden(params, tokens_BT, segments_BT, index_R):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD = decoder.hidden_states(
            params, tokens_BT, segments_BT, positions_BT, cfg, compute_dtype=jnp.float32
        )
        return hidden_BTD[0, index_R].reshape(-1, CHUNK, hidden_BTD.shape[-1])

    def chunk_kl(pair):
        logp, logq = (
            jax.nn.log_softmax(decoder.logits(side[0], h_RD[None], cfg)[0] / temperature)
            for side, h_RD in zip((student, teacher), pair, strict=True)
        )
        return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)

    return jax.lax.map(chunk_kl, (hidden(*student), hidden(*teacher))).reshape(-1)


def coloured_html(tokens: Sequence[str], values: Sequence[float], top: float | None = None) -> str:
    """The text with each token's background by its value, white at 0 to orange at `top`.

    `top` None takes the 98th percentile, so that one outlier does not bleach the rest. The exact
    value stands in the tooltip.
    """
    values = np.asarray(values, float)
    if top is None:
        top = float(np.percentile(values, 98)) if len(values) else 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        alpha = min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
        shown = html.escape(token).replace("\n", "↵<br>")
        style = f"background: rgba(230, 159, 0, {alpha:.2f})"
        spans.append(f'<span title="{value:.4f}" style="{style}">{shown}</span>')
    return f'<div style="font-family: monospace; white-space: pre-wrap">{"".join(spans)}</div>'
