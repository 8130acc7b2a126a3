"""GRPO on Qwen3-8B: arXiv 2603.24472, Tables 8 and 9. Not yet run by us.

    python -m sdjax.main --config=configs/grpo_qwen.py --workdir=gs://BUCKET/RUN
    python -m sdjax.main --config=configs/grpo_qwen.py:tiny           (smoke run on a laptop)

Settings and their sources, table by table: sdjax/paper.py.
"""

from ml_collections import ConfigDict

from sdjax import config, paper

VARIANTS = {
    **paper.GRPO_VARIANTS,
    **paper.THINKING_VARIANTS,
    "1.7b": lambda c: c.model.update(path="Qwen/Qwen3-1.7B"),
}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated; `tiny` is one more)."""
    c = paper.base("Qwen/Qwen3-8B")
    paper.grpo(c)
    return config.with_variants(c, arg, VARIANTS)
