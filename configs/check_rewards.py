"""Checks the golds of a data set against its verifier, and its overlap with evaluation sets.

    python -m sdjax.main --config=configs/check_rewards.py --config.data.path=FILE
    python -m sdjax.main --config=configs/check_rewards.py --config.data.name=math500
    ... --config.eval.sets="('aime24','math500')"      (questions that also stand in these)

FILE is JSONL, JSON or parquet. Columns are found by their usual names or by config.data.columns;
files named as in docs/data.md are recognised as their benchmark. Leaves with status 1 when a gold
does not verify against itself or a row is bad. Takes seconds; needs no accelerator.
"""

from sdjax import config


def get_config(arg: str = ""):
    c = config.base()
    c.mode = "check_rewards"
    c.model.path = ""  # name a model to count prompts that are too long for its tokenizer
    c.data.name = "jsonl"
    c.reward.name = "auto"  # the source's own reward, "math" for an unknown file
    c.eval.sets = ()
    return config.with_variants(c, arg, {})
