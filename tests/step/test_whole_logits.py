"""The compiled step against whole logits of one response per row: no packing, chunks or indices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import step
from sdjax.data import packing
from sdjax.models import decoder
from sdjax.objectives import ObjectiveConfig, distillation_loss, policy_gradient_loss
from tests.step import small

R = 12  # response slots per row of the plain layout
MIXTURE = ObjectiveConfig(pg_coef=0.7, distill_coef=0.3, distillation_topk=5)
MIX = 0.3  # share of the student in the trust-region teacher


def items():
    """Eight responses with ratios against old policy and sampler; three have no teacher."""
    out = small.responses(n=8, old=True)
    out = [
        dataclasses.replace(item, teacher_prompt_tokens=None) if i in (4, 6) else item
        for i, item in enumerate(out)
    ]
    return small.weighted(out)


def plain_rows(prompts, responses):
    """Tokens, segment ids and positions [B, T], and where each response token is predicted."""
    T = max(len(p) for p in prompts) + R
    tokens, index = np.zeros((len(prompts), T), np.int32), np.zeros((len(prompts), R), np.int32)
    segments = np.zeros_like(tokens)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = np.concatenate([prompt, response])
        tokens[b, : len(whole)], segments[b, : len(whole)] = whole, 1
        index[b, : len(response)] = len(prompt) + np.arange(len(response)) - 1
    return tokens, segments, np.broadcast_to(np.arange(T), tokens.shape), index


def plain_logits(tree, rows):
    tokens, segments, positions, index = rows
    hidden = decoder.hidden_states(tree, tokens, segments, positions, small.CFG)
    return decoder.logits(tree, jnp.take_along_axis(hidden, index[..., None], 1), small.CFG)


def padded(responses, name):
    out = np.zeros((len(responses), R), np.float32)
    for b, item in enumerate(responses):
        out[b, : len(item.response_tokens)] = getattr(item, name)
    return out


@pytest.fixture(scope="module")
def plain():
    """(loss, gradient) of MIXTURE by whole logits, for given student and teacher logits' makers."""
    responses = items()
    prompts = [item.prompt_tokens for item in responses]
    # whoever has no teacher gets the plain prompt, as in the reference, and is masked
    contexts = [
        item.prompt_tokens if item.teacher_prompt_tokens is None else item.teacher_prompt_tokens
        for item in responses
    ]
    texts = [item.response_tokens for item in responses]
    student_rows, teacher_rows = plain_rows(prompts, texts), plain_rows(contexts, texts)
    names = ("response_tokens", "old_logp", "sampler_logp")
    tokens, old, sampler = (padded(responses, name) for name in names)
    tokens = tokens.astype(np.int32)
    mask = np.arange(R) < np.array([len(text) for text in texts])[:, None]
    advantage = np.array([item.advantage for item in responses], np.float32)
    taught = np.array([item.teacher_prompt_tokens is not None for item in responses])

    def loss(tree, teacher_logits):
        logits = plain_logits(tree, student_rows)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        distill, _ = distillation_loss(
            logits,
            teacher_logits,
            tokens,
            mask,
            sampler_logp=sampler,
            config=MIXTURE,
            old_logp=old,
            has_teacher=jnp.asarray(taught),
        )
        policy, _ = policy_gradient_loss(logp, old, sampler, advantage, mask, config=MIXTURE)
        return distill + policy

    def run(tree, teacher, mix):
        teacher_logits = (1 - mix) * plain_logits(teacher, teacher_rows)
        teacher_logits += mix * plain_logits(jax.lax.stop_gradient(tree), teacher_rows)
        return jax.value_and_grad(loss)(tree, teacher_logits)

    return small.program(run, small.params(), small.params(1), 0.0)


SPEC = packing.PackingSpec(8, 1, 24, 32, 24)


def packed_run(objective, kind):
    """The compiled step's loss and gradient as a function of (state, batch, mix)."""
    config = step.StepConfig(teacher_kind=kind, remat="none", chunk=5)

    def run(state, batch, mix):
        scalars = step.StepScalars(knobs=objective.knobs(), trust_mix=mix)
        loss, _, grad = step._accumulate(state, batch, scalars, small.CFG, objective, config)
        return loss, grad

    return run


def assert_same(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(float(jnp.abs(y).max()), 1e-3))


def state_with(teacher):
    return step.TrainState(0, small.params(), None, teacher, None, 0)


@pytest.fixture(scope="module")
def batch():
    return packing.pack(items(), SPEC)


@pytest.fixture(scope="module")
def own_teacher(batch):
    """The step's program for a teacher with weights of its own."""
    return small.program(packed_run(MIXTURE, "ema"), state_with(small.params(1)), batch, 0.0)


def test_teachers_of_their_own(plain, own_teacher, batch):
    """An index off by one, a teacher that moves the wrong way, a skipped row that counts."""
    for rate in (0.0, 0.3, 1.0):  # fixed, EMA, snapshot
        state = step.update_teacher(state_with(small.params(1)), rate)
        blend = lambda t, s, r=rate: (1 - r) * t + r * s
        teacher = jax.tree.map(blend, small.params(1), small.params())
        assert_same(own_teacher(state, batch, 0.0), plain(small.params(), teacher, 0.0))


def test_live_teacher_has_no_gradient(plain, batch):
    """The student's own weights on the teacher's prompt, held still."""
    actual = small.compiled(packed_run(MIXTURE, "live"), state_with(None), batch, 0.0)
    assert_same(actual, plain(small.params(), small.params(), 0.0))


def test_trust_region_teacher(plain, batch):
    """Logits mixed the other way round, or the student's read on its own prompt."""
    run = packed_run(MIXTURE, "trust_region")
    actual = small.compiled(run, state_with(small.params(1)), batch, MIX)
    assert_same(actual, plain(small.params(), small.params(1), MIX))


def test_micro_batches_without_a_teacher_run_none(own_teacher, batch):
    """A forward pass for nobody: this teacher's layers would turn everything into NaN."""
    taught = (np.asarray(batch.teacher.segment_ids) > 0).any((1, 2))
    used = np.asarray(batch.mask).any((1, 2))
    assert used.sum() > taught.sum() > 0 and taught[: taught.sum()].all()
    nobody = [dataclasses.replace(item, teacher_prompt_tokens=None) for item in items()]
    head = {"embed": small.params(1)["embed"]}
    broken = jax.tree.map(lambda x: x * jnp.nan, small.params(1)) | head
    loss, grad = own_teacher(state_with(broken), packing.pack(small.weighted(nobody), SPEC), 0.0)
    assert jnp.isfinite(loss) and all(jnp.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_modulation_leaves_responses_without_teacher_alone():
    """Evidence read from a teacher row that is not there, silently moving their advantage."""
    policy = ObjectiveConfig(pg_coef=1.0, distill_coef=0.0)
    untaught = [
        dataclasses.replace(item, weight=item.weight * (item.teacher_prompt_tokens is None))
        for item in items()
    ]
    batch, state = packing.pack(untaught, SPEC), state_with(small.params(1))
    objectives = (policy, dataclasses.replace(policy, mod="anti_phi"))
    seen = [small.compiled(packed_run(o, "ema"), state, batch, 0.0) for o in objectives]
    assert float(jnp.abs(jax.tree.leaves(seen[0][1])[0]).max()) > 1e-4
    assert_same(seen[1], seen[0])
