"""Parameter counts, FLOPs and memory by formula, to check the compiler's and to guess before it.

FLOPs are multiply-adds counted as two, matrix products only. Attention counts every pair of blocks
that causality and the window leave, all segments taken as one: an upper bound, and what the
blockwise implementations compute for a row that holds one sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

from sdjax.models import decoder
from sdjax.models.attention import BLOCK, SPLASH_BLOCK
from sdjax.models.config import ModelConfig

MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")
# Matrix products relative to one forward pass: backward costs two, and full rematerialisation one
# more forward, except for the layer's last product, whose result the backward pass does not need.
# Attention's forward is two products, its backward five; splash computes two of them twice, in its
# kernels for dq and for dk and dv. The head computes logits once, and in the same pass the
# gradients of the hidden states and of the weight.
LAYER_PASSES = {"none": 3.0, "dots": 3.0, "full": 4.0}
LAST = "w_down"
ATTENTION_PASSES = {"none": 3.5, "dots": 4.5, "full": 4.5}
SPLASH_EXTRA = 1.0
HEAD_PASSES = 3.0


def parameter_count(cfg: ModelConfig) -> int:
    """All parameters of the plain model."""
    specs = jax.tree.leaves(decoder.param_specs(cfg), is_leaf=decoder.is_spec)
    return sum(math.prod(spec.shape) for spec in specs)


def layer_parameters(cfg: ModelConfig, names: Sequence[str] = MATRICES) -> int:
    """Parameters of the layers' matrices: each token is multiplied with all of them once."""
    layers = decoder.param_specs(cfg)["layers"]
    return sum(math.prod(layers[name].shape) for name in names)


def visible_pairs(tokens: int, window: int | None, block: int = BLOCK) -> int:
    """(query, key) pairs that blockwise causal attention computes for one row."""
    if tokens <= block:
        return tokens * tokens
    count = -(-tokens // block)
    reach = count if window is None else (window + block - 2) // block
    return block * block * sum(min(i, reach) + 1 for i in range(count))


def attention_flops(cfg: ModelConfig, rows: int, tokens: int, block: int = BLOCK) -> float:
    """Both products of attention, all layers, forward."""
    pairs = sum(visible_pairs(tokens, window, block) for window in cfg.windows)
    return 4.0 * rows * pairs * cfg.n_heads * cfg.head_dim


def matrix_flops(cfg: ModelConfig, rows: int, tokens: int) -> float:
    """The layers' matrix products, forward."""
    return 2.0 * rows * tokens * layer_parameters(cfg)


def forward_flops(cfg: ModelConfig, rows: int, tokens: int, block: int = BLOCK) -> float:
    """Hidden states of `rows` rows of `tokens` tokens."""
    return matrix_flops(cfg, rows, tokens) + attention_flops(cfg, rows, tokens, block)


def head_flops(cfg: ModelConfig, rows: int, slots: int) -> float:
    """One projection of the response slots onto the vocabulary."""
    return 2.0 * rows * slots * cfg.d_model * cfg.vocab_size


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What an optimizer step works on: A micro-batches of B rows, T and T' tokens, R slots."""

    micro_batches: int
    rows: int
    tokens: int
    teacher_tokens: int
    slots: int


def train_flops(
    cfg: ModelConfig,
    shape: StepShape,
    remat: str,
    teacher_passes: int = 1,
    attention: str = "xla",
) -> float:
    """One optimizer step on all devices together, full-parameter training.

    `teacher_passes` is 0 without a teacher and 2 for a trust-region teacher; `attention` as in
    config.model.attention.
    """
    A, B = shape.micro_batches, shape.rows
    block = SPLASH_BLOCK if attention == "splash" else BLOCK
    passes = ATTENTION_PASSES[remat] + (SPLASH_EXTRA if attention == "splash" else 0.0)
    student = LAYER_PASSES[remat] * matrix_flops(cfg, B, shape.tokens)
    if remat == "full":
        student -= 2.0 * B * shape.tokens * layer_parameters(cfg, [LAST])
    student += passes * attention_flops(cfg, B, shape.tokens, block)
    head = HEAD_PASSES * head_flops(cfg, B, shape.slots)
    teacher = 0.0
    if shape.teacher_tokens and teacher_passes:
        one = forward_flops(cfg, B, shape.teacher_tokens, block) + head_flops(cfg, B, shape.slots)
        teacher = teacher_passes * one
    return A * (student + head + teacher)


def decode_flops(cfg: ModelConfig, slots: int, length: int) -> float:
    """One decode step of `slots` rows over `length` cached tokens, all devices together."""
    matrices = 2.0 * slots * (layer_parameters(cfg) + cfg.d_model * cfg.vocab_size)
    return matrices + 4.0 * slots * length * cfg.n_layers * cfg.n_heads * cfg.head_dim


def activation_bytes(cfg: ModelConfig, remat: str, tokens: int, teacher_tokens: int) -> float:
    """What the backward pass keeps per device, in bfloat16, with `tokens` student tokens on it.

    With full rematerialisation one hidden state per layer and token; else also what each layer
    computes. Plus the working set of the one layer that is being computed, of student or teacher.
    """
    wide = 3 * cfg.d_ff + 2 * cfg.n_heads * cfg.head_dim + 2 * cfg.n_kv_heads * cfg.head_dim
    per_layer = cfg.d_model if remat == "full" else 4 * cfg.d_model + wide
    kept = 2.0 * cfg.n_layers * tokens * per_layer
    return kept + 2.0 * max(tokens, teacher_tokens) * (wide + 6 * cfg.d_model)
