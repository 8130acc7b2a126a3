"""How problem sets are evaluated: the paper's sampling settings and what config.eval says of them.

Read by `sdjax.evaluate` and, to plan for it, by `sdjax.build`. Evaluates nothing.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from sdjax.records import SamplingParams

# The paper's settings per kind of model; top-k is a switch of its own, see config.eval.top_k.
PAPER_SAMPLES = 16
PAPER_MAX_NEW_TOKENS = 38912
PAPER_SAMPLING = {
    "thinking": {"temperature": 0.6, "top_p": 0.95},  # Qwen3 thinking on, DeepSeek, OLMo-3
    "non_thinking": {"temperature": 0.7, "top_p": 0.8},  # Qwen3 thinking off
}
PRESETS = ("", "paper", *PAPER_SAMPLING)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How a set is evaluated; `from_config` explains the fields by the config's names."""

    samples: int
    sampling: SamplingParams
    pass_at: tuple[int, ...]
    seed: int = 0
    grade_after_think: bool = True

    @classmethod
    def from_config(cls, c: ConfigDict) -> EvalConfig:
        """Reads c.eval, c.data and c.seed. Raises ValueError naming a bad field."""
        e = c.eval
        if e.preset not in PRESETS:
            raise ValueError(
                f"config.eval.preset is {e.preset!r}, but must be one of "
                f"{', '.join(map(repr, PRESETS))}"
            )
        values = {name: e[name] for name in ("temperature", "top_p", "max_new_tokens")}
        samples = e.samples
        if e.preset:
            kind = {True: "thinking", False: "non_thinking"}[c.data.enable_thinking]
            values = PAPER_SAMPLING[kind if e.preset == "paper" else e.preset]
            values = values | {"max_new_tokens": PAPER_MAX_NEW_TOKENS}
            samples = PAPER_SAMPLES
        bad = [k for k in e.pass_at if not 1 <= k <= samples]
        if bad:
            raise ValueError(
                f"config.eval.pass_at asks for pass@{bad[0]}, but only "
                f"config.eval.samples = {samples} responses are drawn: raise it or drop that k"
            )
        return cls(
            samples=samples,
            sampling=SamplingParams(top_k=e.top_k, min_p=e.min_p, **values),
            pass_at=tuple(e.pass_at) or (samples,),
            seed=c.seed,
            grade_after_think=e.grade_after_think,
        )
