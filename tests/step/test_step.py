"""The whole compiled step: gradients by finite differences, invariances, optimizer and teachers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import measure, parallel, step
from sdjax.compiled import Program
from sdjax.data import packing
from sdjax.models import decoder
from sdjax.objectives import ObjectiveConfig
from sdjax.optimizer import OptimizerConfig
from tests.step import small

INF = float("inf")
# Ratios against the current policy have no gradient, so finite differences need them constant.
DIFFERENTIABLE = {
    "grpo": ObjectiveConfig(pg_coef=1.0, distill_coef=0.0),
    "sdpo": ObjectiveConfig(distillation_topk=5, is_clip=INF),
    "opsd": ObjectiveConfig(
        support="full", alpha=0.0, elem_clip=0.02, temperature=1.1, is_clip=INF
    ),
    "mixture": ObjectiveConfig(pg_coef=0.7, distill_coef=0.3, distillation_topk=5, is_clip=INF),
}
MORE = {
    "reverse_renorm": ObjectiveConfig(alpha=1.0, add_tail=False, distillation_topk=5, is_clip=INF),
    "teacher_topk": ObjectiveConfig(
        support="teacher_topk", add_tail=False, distillation_topk=5, is_clip=INF
    ),
    "entropy_bonus": ObjectiveConfig(pg_coef=1.0, distill_coef=0.0, entropy_coef=0.1),
}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def double_inputs():
    """Responses, student and teacher weights in float64, and a direction in weight space."""
    items = small.responses(old=True)
    tree, teacher = (cast(small.params(seed), jnp.float64) for seed in (0, 1))
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return items, tree, teacher, treedef.unflatten(draws)


def check_finite_difference(objective, surrogate=None):
    """Asserts that gradient . direction is the central difference of the loss along it."""
    with jax.enable_x64(True):
        items, tree, teacher, direction = double_inputs()
        spec = packing.choose_spec(items, micro_rows=2, row_len=24)
        batch = packing.pack(items, spec)
        config = step.StepConfig(remat="full", compute_dtype="float64", chunk=5)
        scalars = step.StepScalars(knobs=objective.knobs())
        run = lambda state, batch, scalars: step._accumulate(
            state, batch, scalars, small.CFG, objective, config
        )
        state = step.TrainState(0, tree, None, teacher, None, 0)
        program = small.program(run, state, batch, scalars)
        _, seen, grad = program(state, batch, scalars)

        def value(eps):
            moved = jax.tree.map(lambda p, d: p + eps * d, tree, direction)
            loss, there, _ = program(state.replace(params=moved), batch, scalars)
            return loss if surrogate is None else surrogate(seen, there, batch)

        eps = 1e-6
        expected = (value(eps) - value(-eps)) / (2 * eps)
        dots = jax.tree.map(lambda g, d: (g * d).sum(), grad, direction)
        actual = sum(jax.tree.leaves(dots))
        assert abs(expected) > 1e-4
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_the_finite_difference(name):
    """A gradient that is lost, doubled or stopped between the loss and any weight."""
    check_finite_difference(DIFFERENTIABLE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_gradient_is_the_finite_difference_more(name):
    """The same for the supports and terms that share most of their program with others."""
    check_finite_difference(MORE[name])


@pytest.mark.slow
def test_sampled_token_gradient_is_that_of_its_surrogate():
    """sg(s - r) s: the coefficient is held where it is, only the last factor moves."""

    def surrogate(base, there, batch):
        coefficient = base["student_logp"] - base["teacher_logp"]
        return (batch.distill_weight * coefficient * there["student_logp"]).sum()

    objective = ObjectiveConfig(support="sampled", alpha=1.0, is_clip=INF, rollout_is_clip=INF)
    check_finite_difference(objective, surrogate)


MIXTURE = ObjectiveConfig(pg_coef=0.7, distill_coef=0.3, distillation_topk=5)


def assert_same(a, b, tolerance=1e-5):
    """Equal losses and gradients; gradients relative to their largest entry."""
    np.testing.assert_allclose(a[0], b[0], rtol=tolerance)
    for x, y in zip(jax.tree.leaves(a[2]), jax.tree.leaves(b[2]), strict=True):
        scale = float(jnp.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(scale, 1e-3))


@pytest.fixture(scope="module")
def reference():
    """Items, and their loss and gradient in one micro-batch of one-chunk rows."""
    items = small.responses(n=8, old=True)
    spec = packing.PackingSpec(1, 8, 48, 64, 32)
    return (
        items,
        spec,
        small.loss_and_grad(items, MIXTURE, small.params(), small.params(1), spec=spec),
    )


@pytest.mark.parametrize(("chunk", "split"), [(3, (1, 8)), (0, (4, 2)), (5, (8, 1))])
def test_chunks_and_micro_batches_do_not_change_the_gradient(reference, chunk, split):
    """A normaliser per micro-batch or chunk, or an accumulator that is not reset."""
    items, spec, expected = reference
    spec = dataclasses.replace(spec, micro_batches=split[0], micro_rows=split[1])
    actual = small.loss_and_grad(
        items, MIXTURE, small.params(), small.params(1), spec=spec, chunk=chunk
    )
    assert_same(actual, expected)


def test_order_padding_and_neighbours_do_not_change_the_gradient(reference):
    """Packing order, row order, contents of padding, or a token that attends to its neighbour."""
    items, spec, expected = reference
    objective, tree, teacher = MIXTURE, small.params(), small.params(1)
    scalars = step.StepScalars(knobs=objective.knobs())
    config = step.StepConfig(remat="none")
    run = lambda state, batch, scalars: step._accumulate(
        state, batch, scalars, small.CFG, objective, config
    )
    state = step.TrainState(0, tree, None, teacher, None, 0)
    batch = packing.pack(items, spec)
    program = small.program(run, state, batch, scalars)

    shuffled = packing.pack(items[::-1], spec)
    assert_same(program(state, shuffled, scalars), expected)

    rows = np.random.default_rng(0).permutation(spec.micro_rows)
    permuted = jax.tree.map(lambda x: x[:, rows], batch)
    assert_same(program(state, permuted, scalars), expected)

    def litter(side):
        junk = np.random.default_rng(1).integers(0, small.CFG.vocab_size, side.tokens.shape)
        return side.replace(tokens=np.where(side.segment_ids > 0, side.tokens, junk))

    fill = lambda x, value: np.where(batch.mask, x, value).astype(x.dtype)
    littered = batch.replace(
        student=litter(batch.student),
        teacher=litter(batch.teacher),
        targets=fill(batch.targets, 3),
        advantage=fill(batch.advantage, 9.0),
        sampler_logp=fill(batch.sampler_logp, -3.0),
        old_logp=fill(batch.old_logp, -50.0),
    )
    assert_same(program(state, littered, scalars), expected)

    # another neighbour in the row: the log-probabilities of the first response stay as they are
    changed = [
        item
        if i == 0
        else dataclasses.replace(item, prompt_tokens=item.prompt_tokens[::-1] % 7 + 1)
        for i, item in enumerate(items)
    ]
    seen = [program(state, packing.pack(x, spec), scalars)[1] for x in (items, changed)]
    first, other = (
        packing.unpack(s["student_logp"], batch, x, spec)
        for s, x in zip(seen, (items, changed), strict=True)
    )
    np.testing.assert_allclose(first[0], other[0], atol=1e-6)
    assert np.abs(first[2] - other[2]).max() > 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 1, 2), (8, 1, 1)])
def test_mesh_shape_does_not_change_the_gradient(reference, shape):
    """A sum over devices that is missing or done twice, with split rows, weights, vocabulary."""
    items, spec, expected = reference
    data, fsdp, tensor = shape
    mesh = parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    places = decoder.param_shardings(small.CFG, mesh)
    tree, teacher = (jax.device_put(small.params(seed), places) for seed in (0, 1))
    batch = step.put_batch(packing.pack(items, spec), mesh)
    scalars = step.StepScalars(knobs=MIXTURE.knobs())
    config = step.StepConfig(remat="none")
    run = lambda state, batch, scalars: step._accumulate(
        state, batch, scalars, small.CFG, MIXTURE, config
    )
    state = step.TrainState(0, tree, None, teacher, None, 0)
    with jax.set_mesh(mesh):
        actual = small.program(run, state, batch, scalars)(state, batch, scalars)
    assert_same(actual, expected)


def test_a_vocabulary_that_does_not_split_over_the_mesh():
    """OLMo-3's 100,278 entries over 4 devices: weights whole, logits split unevenly."""
    cfg = dataclasses.replace(small.CFG, vocab_size=67)
    items, spec = small.responses(), packing.PackingSpec(1, 4, 40, 56, 32)
    run = lambda state, batch, scalars: step._accumulate(
        state, batch, scalars, cfg, MIXTURE, step.StepConfig(remat="none")
    )
    seen = []
    for mesh in (small.one_device(), parallel.make_mesh(data=4, tensor=2)):
        places = decoder.param_shardings(cfg, mesh)
        tree, teacher = (
            jax.device_put(decoder.init_params(cfg, jax.random.key(seed)), places)
            for seed in (0, 1)
        )
        state = step.TrainState(0, tree, None, teacher, None, 0)
        batch = step.put_batch(packing.pack(items, spec), mesh)
        with jax.set_mesh(mesh):
            seen.append(jax.jit(run)(state, batch, step.StepScalars(knobs=MIXTURE.knobs())))
    assert_same(seen[1], jax.device_get(seen[0]))


@pytest.fixture(scope="module")
def trainer():
    """A compiled SDPO step, a fresh state maker and its batch."""
    objective = ObjectiveConfig(distillation_topk=5)
    mesh = small.one_device()
    items = small.responses()
    batch = step.put_batch(packing.pack(items, packing.PackingSpec(2, 2, 40, 56, 32)), mesh)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, weight_decay=0.0)
    train = step.make_train_step(
        small.CFG, objective, optimizer, mesh, step.StepConfig(remat="none", words=("wait", "hmm"))
    )
    fresh = lambda: step.init_state(
        cast(small.params(), jnp.float32), objective, optimizer, mesh, "ema"
    )
    table = jnp.zeros(small.CFG.vocab_size, jnp.int32).at[batch.targets[0, 0, 0]].set(2)
    scalars = step.StepScalars(knobs=objective.knobs(), word_of_token=table)
    return train, fresh, batch, scalars


def test_training_moves_the_student_towards_its_teacher(trainer):
    """A descent direction with the wrong sign, a teacher that moves along, a second compilation."""
    train, fresh, batch, scalars = trainer
    state = fresh()
    before = jax.device_get(state.teacher_params)
    losses = []
    for _ in range(6):
        state, metrics = train(state, batch, scalars)
        losses.append(float(metrics["loss/total"]))
    assert losses[-1] < 0.5 * losses[0]
    assert train.compilations == 1
    assert int(state.step) == 6
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.teacher_params))
    assert metrics["distill/tokens_word_hmm"] >= 1 and metrics["distill/tokens_word_wait"] == 0
    assert metrics["batch/distilled_frac"] < 1
    np.testing.assert_allclose(metrics["optim/lr"], 1e-2, rtol=1e-6)


def test_the_step_consumes_its_state(trainer):
    """Without donation the parameters and both moments would be held twice."""
    train, fresh, batch, scalars = trainer
    state = fresh()
    old = jax.tree.leaves((state.params, state.opt_state, state.teacher_params))
    train(state, batch, scalars)
    assert all(x.is_deleted() for x in old)


def test_parameters_loaded_from_files_are_held_once(trainer):
    """Arrays that belong to numpy, as loaded ones do on a CPU, cannot become the next state's."""
    train, _, batch, scalars = trainer
    mesh, objective = small.one_device(), ObjectiveConfig(distillation_topk=5)
    loaded = jax.tree.map(
        lambda x: jax.make_array_from_callback(
            x.shape, parallel.replicated(mesh), lambda index, x=x: np.array(x)[index]
        ),
        cast(small.params(), jnp.float32),
    )
    state = step.init_state(loaded, objective, small.OPTIMIZER, mesh, "ema")
    assert all(x.is_deleted() for x in jax.tree.leaves(loaded))
    place = lambda state: state.params["embed"].unsafe_buffer_pointer()
    before = place(state)
    state, _ = train(state, batch, scalars)
    assert place(state) == before


def test_measured_waste_is_the_packers(trainer):
    """Fractions over spare micro-batches too, or over those that run no teacher."""
    train, fresh, batch, scalars = trainer
    _, metrics = train(fresh(), batch, scalars)
    waste = packing.waste(jax.device_get(batch))
    for side in ("student", "teacher"):
        np.testing.assert_allclose(metrics[f"batch/{side}_waste"], waste[side], rtol=1e-5)


def test_importance_ratios_are_measured_against_their_caps():
    """A cap of the other ratio, or of tokens outside the mask."""
    mask = jnp.array([[[True, True, True, True, False]]])
    gap = jnp.log(jnp.array([[[1.0, 1.0, 1.5, 3.0, 9.0]]]))
    seen = measure.ratio_metrics("x", gap, mask, 2.0)
    assert seen["x_capped_frac"] == 0.25 and seen["x_p50"] == 1.0
    np.testing.assert_allclose(seen["x_max"], 3.0, rtol=1e-6)
    weights = np.array([1.0, 1.0, 1.5, 3.0])
    expected = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    np.testing.assert_allclose(seen["x_ess"], expected, rtol=1e-5)


def test_non_finite_gradient_skips_the_update_and_is_counted(trainer):
    """NaN that reaches weights or moments, or a counter that forgets."""
    train, fresh, batch, scalars = trainer
    state = fresh()
    before = jax.device_get((state.params, state.opt_state))
    bad = batch.replace(distill_weight=batch.distill_weight * jnp.nan)
    for count in (1, 2):
        state, metrics = train(state, bad, scalars)
        assert metrics["optim/skipped_in_a_row"] == count and metrics["optim/skipped"] == 1
    after = jax.device_get((state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, metrics = train(state, batch, scalars)
    assert metrics["optim/skipped_in_a_row"] == 0 and int(state.skipped) == 0


def test_response_without_teacher_has_no_gradient(trainer):
    """A masked response that is silently distilled."""
    train, fresh, batch, scalars = trainer
    nobody = batch.replace(distill_weight=jnp.zeros_like(batch.distill_weight))
    _, metrics = train(fresh(), nobody, scalars)
    assert metrics["optim/grad_norm"] == 0 and metrics["loss/total"] == 0
    assert metrics["self_distillation/empty_target_batch"] == 1
    assert metrics["batch/distilled_frac"] == 0


def test_knobs_change_without_recompiling(trainer):
    """A schedule that triggers a compilation at every step."""
    train, fresh, batch, scalars = trainer
    before = train.compilations
    half = scalars.replace(knobs=scalars.knobs.replace(distill_coef=0.5))
    _, one = train(fresh(), batch, scalars)
    _, two = train(fresh(), batch, half)
    np.testing.assert_allclose(2 * two["loss/total"], one["loss/total"], rtol=1e-6)
    assert train.compilations == max(before, 1)


def test_score_is_the_log_probability_of_each_response(trainer):
    """Scores that differ from the model's own log-probabilities of the same tokens."""
    items = small.responses()
    spec = packing.PackingSpec(2, 2, 40, 56, 32)
    mesh = small.one_device()
    batch = packing.pack(items, spec)
    tree = small.params()
    score = step.make_score(small.CFG, mesh, step.StepConfig(remat="none"))
    logp = packing.unpack(score(tree, batch)["student_logp"], batch, items, spec)
    for item, ours in zip(items[:2], logp[:2], strict=True):
        tokens = np.concatenate([item.prompt_tokens, item.response_tokens])[None]
        positions = np.arange(tokens.shape[1])[None]
        hidden = decoder.hidden_states(tree, tokens, np.ones_like(tokens), positions, small.CFG)
        whole = jax.nn.log_softmax(decoder.logits(tree, hidden, small.CFG)[0])
        start = len(item.prompt_tokens)
        expected = whole[np.arange(start - 1, tokens.shape[1] - 1), tokens[0, start:]]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "ema", "snapshot", "live", "trust_region"])
def test_teacher_weights_of_each_kind(kind):
    """A live teacher that is copied, or a copy that shares the student's buffers."""
    objective = ObjectiveConfig()
    mesh = small.one_device()
    state = step.init_state(small.params(), objective, small.OPTIMIZER, mesh, kind)
    assert (state.teacher_params is None) == (kind == "live")
    grpo = ObjectiveConfig(pg_coef=1.0, distill_coef=0.0)
    assert step.init_state(small.params(), grpo, small.OPTIMIZER, mesh, kind).teacher_params is None


def test_ema_recorded_cases(shared_dir):
    """teacher <- (1-r) teacher + r student, and not the other way round."""
    with jax.enable_x64(True), np.load(shared_dir / "fixtures/sdpo_ema_two_updates.npz") as data:
        for rate in (0.0, 0.05, 1.0):
            student = {"w": jnp.asarray(data["in_student_params"])}
            state = step.TrainState(0, student, None, None, None, 0)
            state = state.replace(teacher_params={"w": jnp.asarray(data["in_teacher_params"])})
            for _ in range(2):
                state = step.update_teacher(state, rate)
            expected = data[f"out_teacher_after2_rate{rate:g}"]
            np.testing.assert_allclose(state.teacher_params["w"], expected, rtol=1e-12)
    with jax.enable_x64(True), np.load(shared_dir / "fixtures/opsd_ema.npz") as data:
        student, teacher = ({"w": jnp.asarray(data[name])} for name in ("in_p1", "in_p0"))
        state = step.TrainState(0, student, None, None, None, 0).replace(teacher_params=teacher)
        for updates in (1, 2):
            state = step.update_teacher(state, 1 - 0.999)
            expected = data[f"out_ema_after_{updates}"]
            np.testing.assert_allclose(state.teacher_params["w"], expected, rtol=1e-12)


def test_sequence_level_weights_are_refused():
    """A token-level weight under the name of a sequence-level one."""
    objective = ObjectiveConfig(rollout_is_level="sequence")
    with pytest.raises(ValueError, match="rollout_is_level"):
        step.make_train_step(small.CFG, objective, small.OPTIMIZER, small.one_device())


def test_compilations_are_counted_by_what_was_compiled():
    """A second program for the same shapes in another place, or a count shared between programs."""
    double = lambda x: 2 * x + jnp.zeros(3)
    one, other = Program(double), Program(double)
    one(jnp.ones(3))
    one(jnp.ones(3))
    assert one.compilations == 1 and other.compilations == 0
    one(jax.device_put(jnp.ones(3), jax.devices()[1]))
    other(jnp.ones(3))
    assert one.compilations == 2 and other.compilations == 1
