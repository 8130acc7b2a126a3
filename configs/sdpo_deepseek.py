"""SDPO on DeepSeek-R1-Distill-Qwen-7B: arXiv 2603.24472, Tables 8 and 10. Not yet run by us.

    python -m sdjax.main --config=configs/sdpo_deepseek.py --workdir=gs://BUCKET/RUN
    python -m sdjax.main --config=configs/sdpo_deepseek.py:tiny          (smoke run on a laptop)

Differs from the released scripts: the response limit is that of the paper's table (the scripts cap
it at max_model_len, differently for GRPO and SDPO), and the demonstration is shortened when the
teacher's prompt is too long (the scripts cut the prompt's end, closing instruction included).
"""

from ml_collections import ConfigDict

from sdjax import config


def sdpo(c: ConfigDict) -> None:
    """Table 10 of the paper."""
    c.objective.pg_coef = 0.0
    c.objective.distill_coef = 1.0
    c.objective.alpha = 0.5  # Jensen-Shannon
    c.objective.support = "student_topk"
    c.objective.distillation_topk = 100
    c.objective.rollout_is_clip = 2.0
    c.teacher.kind = "ema"
    c.teacher.ema_rate = 0.0  # EMA 0.0: the teacher stays the initial policy
    c.optimizer.lr = 1e-5


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
    "ema0.05": lambda c: c.teacher.update(ema_rate=0.05),
    "lr1e-6": lambda c: c.optimizer.update(lr=1e-6),
    "topk256": lambda c: c.objective.update(distillation_topk=256),
    "no_think_context": lambda c: c.teacher.context.update(strip_think=True),
    "solution_context": lambda c: c.teacher.context.update(kind="solution"),
}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated; see VARIANTS, and `tiny`)."""
    c = config.base()
    common(c)
    sdpo(c)
    return config.with_variants(c, arg, VARIANTS)
