"""Pretrains the embedded tiny model from scratch on the traces of a simulated noisy reasoner.

    python -m sdjax.main --config=configs/tiny_pretrain.py --workdir=runs/tiny_pretrain

The folder runs/tiny_pretrain/export is what ships as sdjax/assets/tiny. docs/tiny.md has the time
this took and the accuracies that came out.
"""

from sdjax import config


def _quick(c):
    """A few minutes instead of the whole run: for trying a change of the traces."""
    c.sft.steps = 250


def get_config(arg=""):
    """Variants: `quick`."""
    c = config.base()
    c.mode = "sft"
    c.model.remat = "none"
    c.sft.init = "scratch"
    c.sft.arch.d_ff = 384
    c.sft.source = "reasoner"
    c.sft.steps = 1300
    c.sft.examples = 22
    c.sft.rows = 10
    c.sft.row_len = 192
    c.sft.slots = 160
    c.optimizer.lr = 3e-3
    c.optimizer.warmup_steps = 60
    c.optimizer.schedule = "cosine"
    c.optimizer.final_lr_frac = 0.03
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.05
    c.checkpoint.every = 50
    return config.with_variants(c, arg, {"quick": _quick})
