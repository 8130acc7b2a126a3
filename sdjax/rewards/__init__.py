"""Rewards: extraction, mathematical equality, choices, formats, tools, code, and the worker pool.

Importing this package never imports jax, sympy or math-verify. `verify` judges one response,
`VerifierPool` many; `get_reward` gives a reward by name; `check_gold` tells whether a gold can be
used at all. Conventions: docs/verifier.md.
"""

from sdjax.records import Verdict
from sdjax.rewards.options import RewardConfig
from sdjax.rewards.pool import VerifierPool
from sdjax.rewards.registry import Reward, get_reward, names
from sdjax.rewards.single import check_gold, verify

__all__ = [
    "Reward",
    "RewardConfig",
    "Verdict",
    "VerifierPool",
    "check_gold",
    "get_reward",
    "names",
    "verify",
]
