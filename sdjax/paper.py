"""The settings of arXiv 2603.24472, table by table: what configs/{sdpo,grpo}_*.py share.

Differs from the released scripts: the response limit is that of the paper's table (the scripts cap
it at max_model_len, differently for GRPO and SDPO), and the demonstration is shortened when the
teacher's prompt is too long (the scripts cut the prompt's end, closing instruction included).
"""

from ml_collections import ConfigDict

from sdjax import config


def base(model: str) -> ConfigDict:
    """Tables 8 (training) and 11 (evaluation), for the model of that hub name."""
    c = config.base()
    c.model.path = model
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
    c.mesh.fsdp = 16  # for a v5p-128; the variant v6e is for a v6e-256 (docs/pods.md)
    c.rollout.slots = 32
    return c


def sdpo(c: ConfigDict) -> None:
    """Table 10: top-100 Jensen-Shannon divergence to the initial policy shown a solution."""
    c.objective.pg_coef = 0.0
    c.objective.distill_coef = 1.0
    c.objective.alpha = 0.5  # Jensen-Shannon
    c.objective.support = "student_topk"
    c.objective.distillation_topk = 100
    c.objective.rollout_is_clip = 2.0
    c.teacher.kind = "ema"
    c.teacher.ema_rate = 0.0  # EMA 0.0: the teacher stays the initial policy
    c.optimizer.lr = 1e-5


def grpo(c: ConfigDict) -> None:
    """Table 9.

    The advantage is centred by the group's mean and not divided by its deviation, and every
    response weighs the same whatever its length: so the released scripts compute it, although no
    table says so.
    """
    c.objective.pg_coef = 1.0
    c.objective.distill_coef = 0.0
    c.objective.clip_low = 0.2
    c.objective.clip_high = 0.28
    c.objective.rollout_is_clip = 2.0
    c.objective.kl_coef = 0.0
    c.optimizer.lr = 1e-6


def nothink(c: ConfigDict) -> None:
    """Thinking off, with the evaluation settings of Table 11 for it (Qwen3)."""
    c.data.enable_thinking = False
    c.eval.temperature, c.eval.top_p = 0.7, 0.8


def coverage(c: ConfigDict) -> None:
    """Task coverage (Sec. 6.2): batch 64, thinking off; choose |D| by --config.data.subset_size."""
    nothink(c)
    c.batch.prompts, c.batch.mini_prompts = 64, 32


def v6e(c: ConfigDict) -> None:
    """A v6e-256, whose chips have a third of a v5p's memory."""
    c.mesh.fsdp, c.mesh.tensor = 64, 4
    c.rollout.slots = 12


def olmo(c: ConfigDict) -> None:
    """Every head of OLMo-3 has keys and values of its own: 20 GiB for each longest response."""
    c.rollout.tensor, c.rollout.slots = 4, 12


def olmo_v6e(c: ConfigDict) -> None:
    """OLMo-3 on a v6e-256."""
    v6e(c)
    c.rollout.slots = 4


# What the paper varies. The first two need a model whose thinking can be switched off.
THINKING_VARIANTS = {"nothink": nothink, "coverage": coverage}
GRPO_VARIANTS = {"mini64": lambda c: c.batch.update(mini_prompts=64), "v6e": v6e}
SDPO_VARIANTS = {
    **GRPO_VARIANTS,
    "ema0.05": lambda c: c.teacher.update(ema_rate=0.05),
    "lr1e-6": lambda c: c.optimizer.update(lr=1e-6),
    "topk256": lambda c: c.objective.update(distillation_topk=256),
    "no_think_context": lambda c: c.teacher.context.update(strip_think=True),
    "solution_context": lambda c: c.teacher.context.update(kind="solution"),
}
