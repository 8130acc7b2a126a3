"""SDPO on Olmo-3-7B-Instruct: arXiv 2603.24472, Tables 8 and 10. Not yet run by us.

    python -m sdjax.main --config=configs/sdpo_olmo.py --workdir=gs://BUCKET/RUN
    python -m sdjax.main --config=configs/sdpo_olmo.py:tiny           (smoke run on a laptop)

Settings and their sources, table by table: sdjax/paper.py.
"""

from ml_collections import ConfigDict

from sdjax import config, paper

VARIANTS = {**paper.SDPO_VARIANTS, "v6e": paper.olmo_v6e}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated; `tiny` is one more)."""
    c = paper.base("allenai/Olmo-3-7B-Instruct")
    paper.sdpo(c)
    paper.olmo(c)
    return config.with_variants(c, arg, VARIANTS)
