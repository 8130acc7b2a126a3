# %% [markdown]
# # One training step of SDPO, by hand
#
# Follows one group of responses through everything that a training step does, with the shape of
# each array. It uses the same functions as the training loop, on the tiny model that ships with the
# package: nothing is downloaded, and a CPU needs less than a minute. Change anything and run again.
#
# `debug_step.py` is the place to edit; `python notebooks/build.py` makes `debug_step.ipynb` of it.

# %%
import dataclasses
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import HTML

from sdjax import collect, config, parallel, step
from sdjax.analysis import epistemic, tables, token_kl
from sdjax.data import chat, packing, synthetic
from sdjax.models import decoder, from_pretrained
from sdjax.objectives import ObjectiveConfig, distillation_loss
from sdjax.objectives.advantages import group_advantage
from sdjax.objectives.aggregation import response_weights
from sdjax.optimizer import OptimizerConfig
from sdjax.records import SamplingParams
from sdjax.rewards import VerifierPool
from sdjax.rollout.buckets import EngineConfig
from sdjax.rollout.engine import Engine
from sdjax.teacher.context import ContextConfig, build_contexts

logging.disable(logging.INFO)
warnings.filterwarnings("ignore", message="IProgress not found")


def show_shapes(tree, title):
    """Name, shape and dtype of each array of a dataclass."""
    rows = []
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if value is None or dataclasses.is_dataclass(value):
            continue
        rows.append([field.name, str(tuple(value.shape)), str(value.dtype)])
    print(title)
    print(tables.markdown(["array", "shape", "dtype"], rows, left=3))


# %% [markdown]
# ## 0. The model and the config
#
# The config is the base config (the paper's SDPO) shrunk to the tiny model, as `:tiny` does on the
# command line.

# %%
c = config.base()
config.shrink(c)
c.batch.group_size = 8
c.sampling.max_new_tokens = 96
c.teacher.context.fallback = "solution"  # when no sibling is right, show the data set's solution
c.optimizer.warmup_steps = 0  # otherwise the first update has learning rate 0

mesh = parallel.single_device_mesh()
model = from_pretrained(c.model.path, mesh)
print(f"{sum(x.size for x in jax.tree.leaves(model.params)):,} parameters")
print("layers are stacked: w_q [L, D, H, C] =", model.params["layers"]["w_q"].shape)

# %% [markdown]
# ## 1. Data yields problems

# %%
problems = synthetic.make_problems("train", 6, seed=c.seed)
style = collect.PromptStyle(model.tokenizer, c.data.enable_thinking, None, None)
print(problems[0].prompt, "\n-> gold", problems[0].answer)
print("prompt tokens:", style.encode(problems[0]).shape)

# %% [markdown]
# ## 2. and 3. The rollout engine samples a group for each, worker processes verify
#
# Responses are verified as soon as they end, while others are still being sampled.

# %%
engine = Engine(
    model.cfg,
    EngineConfig(
        slots=48,
        max_prompt_len=64,
        max_new_tokens=c.sampling.max_new_tokens,
        first_length=192,
        row_halvings=0,  # few shapes, so that little is compiled
    ),
    mesh,
    chat.end_token_ids(model.tokenizer, model.generation),
)
with VerifierPool(workers=1) as pool:
    sampled, timings = collect.sample_and_verify(
        engine,
        engine.prepare(model.params),
        pool,
        style,
        problems,
        c.batch.group_size,
        SamplingParams(max_new_tokens=c.sampling.max_new_tokens),
        seed=c.seed,
        step=1,
    )
rewards = np.array([r.verdict.reward for r in sampled]).reshape(len(problems), -1)
print("rewards [P, G]\n", rewards)

# %% [markdown]
# From here on one group: the first with both correct and wrong responses, the only kind that GRPO
# learns from.

# %%
mixed = [p for p in range(len(problems)) if 0 < rewards[p].mean() < 1]
chosen = mixed[0] if mixed else 0
group = [r for r in sampled if r.group == chosen]
rows = [
    [
        str(r.index),
        "right" if r.verdict.correct else "wrong",
        str(r.verdict.extracted),
        str(len(r.response_tokens)),
        r.finish_reason,
        str(epistemic.total(epistemic.count(r.text))),
    ]
    for r in group
]
print(group[0].problem.prompt, "\n-> gold", group[0].problem.answer, "\n")
print(tables.markdown(["response", "verdict", "answer", "tokens", "end", "epistemic"], rows))

# %%
print(group[0].text)

# %% [markdown]
# ## 4. What the teacher sees
#
# For each response a correct sibling, never the response itself. `TeacherContext.prompt_tokens` is
# None where there is nothing to show; such a response is not distilled.

# %%
contexts, counts = build_contexts(
    group,
    ContextConfig.from_config(c),
    model.tokenizer,
    enable_thinking=c.data.enable_thinking,
    system=None,
    chat_template=None,
    seed=c.seed,
    step=1,
)
for r, context in zip(group, contexts, strict=True):
    length = len(context.prompt_tokens) if context.has_teacher else 0
    print(r.index, context.kind, "student prompt", len(r.prompt_tokens), "teacher prompt", length)
taught = next(i for i, context in enumerate(contexts) if context.has_teacher)
print("\n" + contexts[taught].text)

# %% [markdown]
# ## 5. Packing
#
# Several sequences share a row; row b of the student and of the teacher holds the same responses.
# What the loss needs is indexed: `student_index` says where in the row the hidden state sits that
# predicts a response token. `weight` and `distill_weight` carry the aggregation, so that losses
# only add.

# %%
objective = ObjectiveConfig.from_config(c)
lengths = np.array([len(r.response_tokens) for r in group])
has_teacher = np.array([context.has_teacher for context in contexts])
weights, distill_weights = response_weights(lengths, has_teacher, objective.loss_agg)
advantages = group_advantage([r.verdict.reward for r in group], np.zeros(len(group)))
items = [
    packing.PackItem(
        prompt_tokens=r.prompt_tokens,
        response_tokens=r.response_tokens,
        sampler_logp=r.sampler_logp,
        teacher_prompt_tokens=context.prompt_tokens,
        advantage=float(advantage),
        weight=float(weight),
        distill_weight=float(distill_weight),
    )
    for r, context, advantage, weight, distill_weight in zip(
        group, contexts, advantages, weights, distill_weights, strict=True
    )
]
spec = packing.choose_spec(items, micro_rows=2)
batch = packing.pack(items, spec)
print(spec, "\n")
show_shapes(batch.student, "student rows [A, B, T]")
show_shapes(batch.teacher, "teacher rows [A, B, T']")
show_shapes(batch, "response slots [A, B, R]")
print("empty:", {name: round(x, 2) for name, x in packing.waste(batch).items()})

# %% [markdown]
# ## 6. Where teacher and student disagree
#
# KL(student || teacher) at each token of one response: same weights, same response, but the teacher
# has seen the privileged context. Hover for the value.

# %%
watched = next((i for i in np.flatnonzero(has_teacher) if not group[i].verdict.correct), taught)
response = group[watched].response_tokens
divergence_R = token_kl.response_kl(
    model.params,
    model.params,
    model.cfg,
    group[watched].prompt_tokens,
    contexts[watched].prompt_tokens,
    response,
)
words = [chat.decode(model.tokenizer, [t], skip_special_tokens=False) for t in response]
verdict = "right" if group[watched].verdict.correct else "wrong"
print(f"response {watched} ({verdict}), mean {divergence_R.mean():.3f} nats per token")
HTML(token_kl.coloured_html(words, divergence_R))

# %% [markdown]
# ## 7. One gradient step by hand
#
# The loss without packing or chunks: one padded row per response, full logits. `jax.value_and_grad`
# gives the gradient, optax the update, and the loss goes down.


# %%
def padded(prompts):
    """Rows [B, T] of prompt + response, segment ids, and where each response slot is predicted."""
    longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    tokens = np.zeros((len(prompts), longest), np.int32)
    index = np.zeros((len(prompts), lengths.max()), np.int32)
    for b, (prompt, r) in enumerate(zip(prompts, group, strict=True)):
        row = np.concatenate([prompt, r.response_tokens])
        tokens[b, : len(row)] = row
        index[b, : lengths[b]] = len(prompt) - 1 + np.arange(lengths[b])
    used = np.arange(longest) < np.array([[len(p)] for p in prompts]) + lengths[:, None]
    return tokens, used.astype(np.int32), index


student_rows = padded([r.prompt_tokens for r in group])
no_context = np.zeros(1, np.int32)  # a row that distill_weight 0 keeps out of the loss
teacher_rows = padded([x.prompt_tokens if x.has_teacher else no_context for x in contexts])
mask_BR = np.arange(lengths.max()) < lengths[:, None]
targets_BR = np.zeros(mask_BR.shape, np.int32)
targets_BR[mask_BR] = np.concatenate([r.response_tokens for r in group])
sampler_logp_BR = np.zeros(mask_BR.shape, np.float32)
sampler_logp_BR[mask_BR] = np.concatenate([r.sampler_logp for r in group])


def response_logits(params, rows):
    """Logits [B, R, V] that predict the response tokens."""
    tokens_BT, segments_BT, index_BR = rows
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD = decoder.hidden_states(params, tokens_BT, segments_BT, positions_BT, model.cfg)
    hidden_BRD = jnp.take_along_axis(hidden_BTD, index_BR[..., None], axis=1)
    return decoder.logits(params, hidden_BRD, model.cfg)


optimizer = OptimizerConfig.from_config(c)
adam = optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.adamw(
        optimizer.lr, optimizer.b1, optimizer.b2, optimizer.eps, weight_decay=optimizer.weight_decay
    ),
)


@jax.jit
def step_by_hand(params, teacher_params):
    """The loss, its gradient's norm, and the loss after one update."""
    teacher_logits_BRV = response_logits(teacher_params, teacher_rows)

    def loss(params):
        return distillation_loss(
            response_logits(params, student_rows),
            teacher_logits_BRV,
            targets_BR,
            mask_BR.astype(np.float32),
            config=objective,
            has_teacher=has_teacher.astype(np.float32),
        )[0]

    before, gradient = jax.value_and_grad(loss)(params)
    updates, _ = adam.update(gradient, adam.init(params), params)
    return before, optax.global_norm(gradient), loss(optax.apply_updates(params, updates))


before, norm, after = step_by_hand(model.params, model.params)
print(f"loss {before:.6f} -> {after:.6f}, gradient norm {norm:.4f}")
assert after < before, "the student did not move towards the teacher"

# %% [markdown]
# ## 8. The compiled step does the same
#
# One call on the packed batch: the same loss and the same gradient norm, without any array of size
# tokens x vocabulary.

# %%
how = step.StepConfig.from_config(c)
train_step = step.make_train_step(model.cfg, objective, optimizer, mesh, how)
state = step.init_state(
    jax.tree.map(jnp.copy, model.params), objective, optimizer, mesh, c.teacher.kind
)
scalars = step.StepScalars(knobs=objective.knobs())
state, metrics = train_step(state, step.put_batch(batch, mesh), scalars)
compiled_loss, compiled_norm = float(metrics["loss/total"]), float(metrics["optim/grad_norm"])
print(f"by hand:  loss {before:.6f}, gradient norm {norm:.4f}")
print(f"compiled: loss {compiled_loss:.6f}, gradient norm {compiled_norm:.4f}")
np.testing.assert_allclose([compiled_loss, compiled_norm], [before, norm], rtol=1e-3)

# %%
print(tables.markdown(["metric", "value"], [[k, f"{float(v):.4g}"] for k, v in metrics.items()]))
