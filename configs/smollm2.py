"""GRPO and SDPO on a real pretrained language model on a CPU: SmolLM2-135M-Instruct, short sums.

    python -m sdjax.main --config=configs/smollm2.py --workdir=runs/smollm2          (SDPO)
    python -m sdjax.main --config=configs/smollm2.py:grpo --workdir=runs/smollm2_grpo

`--config.model.path=FOLDER` takes a local copy instead of the hub's. One sum or difference per
problem, in plain English; answers of at most 24 tokens; low-rank adapters. The chat template shows
two solved examples and drops the instruction, which a model of this size answers with prose.
"""

from ml_collections import ConfigDict

from sdjax import config
from sdjax.data.prompts import BOXED

TEMPLATE = (
    "<|im_start|>user\nWhat is 15 minus 6?<|im_end|>\n"
    "<|im_start|>assistant\n15-6=9. \\boxed{9}<|im_end|>\n"
    "<|im_start|>user\nMia has 8 books and gets 7 more. How many books are there now?<|im_end|>\n"
    "<|im_start|>assistant\n8+7=15. \\boxed{15}<|im_end|>\n"
    "{% set boxed = '" + BOXED.replace("\\", "\\\\") + "' %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | replace(boxed, '') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def grpo(c: ConfigDict) -> None:
    """The baseline: reward alone."""
    c.objective.pg_coef, c.objective.distill_coef = 1.0, 0.0


def tiny(c: ConfigDict) -> None:
    """The usual smoke run, with the embedded model's own template."""
    config.shrink(c)
    c.data.chat_template = None


VARIANTS = {"sdpo": lambda c: None, "grpo": grpo, "tiny": tiny}


def get_config(arg: str = "") -> ConfigDict:
    """The run, or its variants named in `arg` (comma separated)."""
    c = config.base()
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.remat = "none"
    c.model.lora.rank, c.model.lora.alpha = 16, 32.0
    c.data.name, c.data.split, c.data.synthetic_size = "synthetic", "easy", 1024
    c.data.chat_template = TEMPLATE
    c.data.max_prompt_len = 128
    c.batch.prompts, c.batch.mini_prompts, c.batch.group_size = 4, 4, 8
    c.batch.row_len, c.batch.teacher_row_len = 512, 768
    c.sampling.max_new_tokens = 24
    c.rollout.slots = 32
    c.objective.distillation_topk = 16
    # the paper's closing sentence turns this model to prose, a solution in brackets does not
    c.teacher.context.template = "{prompt}{solution}{feedback}"
    c.teacher.context.solution_template = " ({successful_previous_attempt})"
    c.teacher.context.max_len = 256
    c.optimizer.lr, c.optimizer.warmup_steps = 2e-4, 0
    c.train.steps = 12
    c.eval.sets = ("easy_test",)
    c.eval.problems, c.eval.samples, c.eval.every = 32, 4, 0
    c.eval.temperature, c.eval.top_p, c.eval.top_k = 1.0, 1.0, 0
    c.eval.max_new_tokens = 24
    c.checkpoint.every = 12
    c.log.text_every, c.log.kl_to_initial = 4, False
    return config.with_variants(c, arg, VARIANTS)
