"""A two-layer model and packed mini-batches small enough to check by finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import parallel, step
from sdjax.data import packing
from sdjax.models import decoder
from sdjax.models.config import ModelConfig
from sdjax.objectives import ObjectiveConfig
from sdjax.objectives.aggregation import response_weights
from sdjax.optimizer import OptimizerConfig

CFG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
)
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=0)
OBJECTIVES = {
    "grpo": ObjectiveConfig(pg_coef=1.0, distill_coef=0.0),
    "sdpo": ObjectiveConfig(distillation_topk=5),
    "sdpo_full_forward": ObjectiveConfig(support="full", alpha=0.0),
    "sdpo_reverse_renorm": ObjectiveConfig(alpha=1.0, add_tail=False, distillation_topk=5),
    "sampled": ObjectiveConfig(support="sampled", alpha=1.0),
    "opsd_clip": ObjectiveConfig(support="full", alpha=0.0, elem_clip=0.05, temperature=1.1),
    "opsd_topk": ObjectiveConfig(support="teacher_topk", add_tail=False, distillation_topk=5),
    "mixture": ObjectiveConfig(pg_coef=0.7, distill_coef=0.3, distillation_topk=5),
    "antisd": ObjectiveConfig(pg_coef=1.0, distill_coef=0.0, mod="anti_phi"),
}


def params(seed=0, dtype=jnp.float32, scale=3.0):
    """Random parameters; scaled so that the distributions are far from uniform."""
    tree = decoder.init_params(CFG, jax.random.key(seed), dtype)
    tree["embed"] = tree["embed"] * scale
    return tree


def responses(n=6, seed=0, old=False, longest=12):
    """Responses of various lengths; the second has no teacher."""
    rng = np.random.default_rng(seed)
    words = lambda count: rng.integers(1, CFG.vocab_size, count).astype(np.int32)
    out = []
    for i in range(n):
        r = int(rng.integers(1, longest + 1))
        prompt = words(int(rng.integers(1, 6)))
        logp = -rng.exponential(2.0, r).astype(np.float32)
        out.append(
            packing.PackItem(
                prompt_tokens=prompt,
                response_tokens=words(r),
                sampler_logp=logp,
                weight=0.0,
                advantage=float(rng.normal()),
                teacher_prompt_tokens=None if i == 1 else np.concatenate([prompt, words(4)]),
                old_logp=logp + 0.1 * rng.normal(size=r).astype(np.float32) if old else None,
            )
        )
    return weighted(out)


def weighted(items, loss_agg="rows-incl-masked", **kwargs):
    """The items with the aggregation weights of their mini-batch."""
    lengths = np.array([len(item.response_tokens) for item in items])
    taught = np.array([item.teacher_prompt_tokens is not None for item in items])
    policy, distill = response_weights(lengths, taught, loss_agg, **kwargs)
    return [
        dataclasses.replace(item, weight=float(w), distill_weight=float(d))
        for item, w, d in zip(items, policy, distill, strict=True)
    ]


def program(function, *args):
    """function as one program, without the optimisations that cost most compile time."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})


def compiled(function, *args):
    """function(*args) through `program`."""
    return program(function, *args)(*args)


def one_device():
    return parallel.single_device_mesh()


def loss_and_grad(items, objective, tree, teacher=None, *, spec=None, chunk=0, config=None):
    """Loss and gradient through the packed, chunked path of the compiled step."""
    spec = spec or packing.choose_spec(items, micro_rows=1)
    batch = packing.pack(items, spec)
    config = dataclasses.replace(config or step.StepConfig(remat="none"), chunk=chunk)
    dtype = tree["embed"].dtype
    config = dataclasses.replace(config, compute_dtype=str(dtype))
    state = step.TrainState(0, tree, None, teacher, None, 0)
    scalars = step.StepScalars(knobs=objective.knobs())

    def run(state, batch, scalars):
        return step._accumulate(state, batch, scalars, CFG, objective, config)

    return compiled(run, state, batch, scalars)
