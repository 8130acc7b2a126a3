"""A next-token distribution as the objectives see it: logits, temperature and log-normaliser.

The normaliser reads the whole vocabulary, so it is computed once and handed around; single
log-probabilities are then gathered, and the vocabulary is divided by the temperature nowhere but
inside passes that read it anyway.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from sdjax.objectives import divergence
from sdjax.objectives.partition import log_sum_exp
from sdjax.objectives.topk import gather
from sdjax.types import Array


@flax.struct.dataclass
class Distribution:
    """softmax(logits / temperature) over the last axis: logits [..., V] in float32 or wider."""

    logits: Array
    temperature: Array | float
    log_z: Array  # [...], log sum_v exp(logits_v / temperature)

    @classmethod
    def of(cls, logits: Array, temperature: Array | float = 1.0) -> Distribution:
        """From logits of any float type; bfloat16 and float16 become float32."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return cls(logits, temperature, log_sum_exp(logits, temperature))

    def logp_at(self, ids: Array) -> Array:
        """Log-probabilities [..., K] of the tokens `ids` [..., K]."""
        return gather(self.logits, ids) / self.temperature - self.log_z[..., None]

    def logp(self) -> Array:
        """Log-probabilities [..., V] of all tokens."""
        return self.logits / self.temperature - self.log_z[..., None]

    def entropy(self) -> Array:
        """-sum_v p_v log p_v, [...]; logits of -inf count as zero mass."""
        return divergence.entropy(self.logits / self.temperature, self.log_z)
