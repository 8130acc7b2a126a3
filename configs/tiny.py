"""SDPO on the embedded model: a laptop, minutes, nothing to download. Results: docs/tiny.md.

    python -m sdjax.main --config=configs/tiny.py               (SDPO)
    python -m sdjax.main --config=configs/tiny.py:grpo          (GRPO, the same but for the loss)

As the paper's runs but small: 16 problems x 8 responses of at most 128 tokens, one optimizer step
per batch, top-16 of a small vocabulary.
"""

from ml_collections import ConfigDict

from sdjax import config


def grpo(c: ConfigDict) -> None:
    """The baseline: reward alone."""
    c.objective.pg_coef, c.objective.distill_coef = 1.0, 0.0


def ema(c: ConfigDict) -> None:
    """A teacher that follows the student at the rate of the SDPO paper."""
    c.teacher.ema_rate = 0.05


VARIANTS = {
    "sdpo": lambda c: None,
    "grpo": grpo,
    "ema0.05": ema,
    "no_think_context": lambda c: c.teacher.context.update(strip_think=True),
    "solution_context": lambda c: c.teacher.context.update(kind="solution"),
}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated)."""
    c = config.base()
    c.model.path = "tiny"
    c.model.remat = "none"
    c.data.name = "synthetic"
    c.data.max_prompt_len = 64
    c.batch.prompts, c.batch.mini_prompts, c.batch.group_size = 16, 16, 8
    c.sampling.max_new_tokens = 128
    c.batch.row_len, c.batch.teacher_row_len, c.batch.micro_rows = 256, 384, 8
    c.rollout.slots = 64
    c.rollout.first_length, c.rollout.row_halvings = 256, 1  # few programs to compile
    c.objective.distillation_topk = 16
    c.teacher.context.max_len = 224
    c.optimizer.lr = 3e-4
    c.train.steps = 40
    c.eval.sets = ("test", "ood_steps", "ood_large", "ood_family")
    c.eval.problems, c.eval.samples, c.eval.every = 64, 4, 20
    c.eval.temperature, c.eval.top_p, c.eval.top_k = 1.0, 1.0, 0
    c.eval.max_new_tokens = 128
    c.checkpoint.every = 10
    c.checkpoint.best_metric = "eval/test/avg@4"
    c.log.text_every = 10
    return config.with_variants(c, arg, VARIANTS)
