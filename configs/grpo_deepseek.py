"""GRPO on DeepSeek-R1-Distill-Qwen-7B: arXiv 2603.24472, Tables 8 and 9. Not yet run by us.

    python -m sdjax.main --config=configs/grpo_deepseek.py --workdir=gs://BUCKET/RUN
    python -m sdjax.main --config=configs/grpo_deepseek.py:tiny          (smoke run on a laptop)

The advantage is centred by the group's mean and not divided by its deviation, and every response
weighs the same whatever its length: so the released scripts compute it, although no table says so.
"""

from ml_collections import ConfigDict

from sdjax import config


def grpo(c: ConfigDict) -> None:
    """Table 9 of the paper."""
    c.objective.pg_coef = 1.0
    c.objective.distill_coef = 0.0
    c.objective.clip_low = 0.2
    c.objective.clip_high = 0.28
    c.objective.rollout_is_clip = 2.0
    c.objective.kl_coef = 0.0
    c.optimizer.lr = 1e-6


def common(c: ConfigDict) -> None:
    """Tables 8 (training) and 11 (evaluation) of the paper."""
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    c.data.name = "dapo_math"
    c.data.enable_thinking = True
    c.data.max_prompt_len = 2048
    c.sampling.max_new_tokens = 20480
    c.sampling.temperature = 1.0
    c.batch.prompts = 256
    c.batch.mini_prompts = 128
    c.batch.group_size = 8
    c.optimizer.warmup_steps = 10
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0
    c.eval.sets = ("aime24",)
    c.eval.samples = 16
    c.eval.max_new_tokens = 38912
    c.eval.temperature, c.eval.top_p, c.eval.top_k = 0.6, 0.95, 20
    c.mesh.fsdp = 16


VARIANTS = {
    "mini64": lambda c: c.batch.update(mini_prompts=64),
}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated; see VARIANTS, and `tiny`)."""
    c = config.base()
    common(c)
    grpo(c)
    return config.with_variants(c, arg, VARIANTS)
