"""Packing: nothing lost, nothing twice, right places, little waste, few shapes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.data import packing
from sdjax.objectives.aggregation import LOSS_AGGS, response_weights


def make_items(lengths, prompts, contexts, seed=0):
    """Items with distinct tokens everywhere; context 0 means no teacher."""
    counter = iter(range(1, 10**9))
    fresh = lambda n: np.array([next(counter) for _ in range(n)], np.int32)
    rng = np.random.default_rng(seed)
    items = []
    for r, p, c in zip(lengths, prompts, contexts, strict=True):
        prompt = fresh(p)
        items.append(
            packing.PackItem(
                prompt_tokens=prompt,
                response_tokens=fresh(r),
                sampler_logp=rng.normal(size=r).astype(np.float32),
                weight=float(rng.uniform(0.1, 1)),
                distill_weight=float(rng.uniform(0.1, 1)),
                advantage=float(rng.normal()),
                teacher_prompt_tokens=np.concatenate([prompt, fresh(c)]) if c else None,
            )
        )
    return items


sizes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 4))
def test_every_response_once_with_both_views_in_the_same_row(triples, micro_rows):
    """A response that is dropped, doubled, or whose index points at another's hidden state."""
    items = make_items(*zip(*triples, strict=True))
    spec = packing.choose_spec(items, micro_rows=micro_rows)
    batch = packing.pack(items, spec)
    seen = {}
    places = np.argwhere(batch.mask)
    for a, b, r in places:
        target = int(batch.targets[a, b, r])
        assert target not in seen
        seen[target] = (a, b, r)
    for item in items:
        for t, token in enumerate(item.response_tokens):
            a, b, r = seen.pop(int(token))
            views = [("student", item.prompt_tokens)]
            if item.teacher_prompt_tokens is not None:
                views.append(("teacher", item.teacher_prompt_tokens))
            else:
                assert batch.distill_weight[a, b, r] == 0
            for side, prompt in views:
                rows = getattr(batch, side)
                at = getattr(batch, f"{side}_index")[a, b, r]
                before = item.response_tokens[t - 1] if t else prompt[-1]
                assert rows.tokens[a, b, at] == before
                assert rows.positions[a, b, at] == len(prompt) - 1 + t
                segment = rows.segment_ids[a, b, at]
                members = rows.tokens[a, b][rows.segment_ids[a, b] == segment]
                whole = np.concatenate([prompt, item.response_tokens[:-1]])
                np.testing.assert_array_equal(members, whole)
            assert batch.position[a, b, r] == t
            assert batch.advantage[a, b, r] == np.float32(item.advantage)
            assert batch.sampler_logp[a, b, r] == item.sampler_logp[t]
    assert not seen
    rows = batch.mask.any(-1).reshape(-1)
    assert not rows[rows.sum() :].any()  # what is empty comes last
    slots = batch.mask.sum(-1)
    assert all((batch.mask[a, b, : slots[a, b]]).all() for a, b in np.ndindex(slots.shape))


def skewed(n=256, seed=0):
    """Lengths as in training: most short, some at the limit, prompts and contexts of all sizes."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(16 + rng.exponential(300, n).astype(int), 2048)
    prompts = rng.integers(20, 200, n)
    contexts = np.where(rng.uniform(size=n) < 0.8, rng.integers(50, 600, n), 0)
    return make_items(lengths, prompts, contexts)


def test_waste_on_skewed_lengths_is_at_most_a_tenth():
    """First-come packing, or rows as long as the longest sequence only."""
    items = skewed()
    spec = packing.choose_spec(items, micro_rows=1, row_len=2304)
    assert_little_waste(items, spec)


def assert_little_waste(items, spec):
    """At most a tenth of either side's rows. Empty slots cost nothing: the head skips them."""
    waste = packing.waste(packing.pack(items, spec))
    assert waste["student"] <= 0.10 and waste["teacher"] <= 0.10, waste


def long_items(taught, n=1024, seed=0):
    """A mini-batch of the paper's size: median 2,500 tokens, limit 20,480, groups of eight.

    A taught response's teacher sees a response of the same group, thinking included.
    """
    rng = np.random.default_rng(seed)
    lengths = np.minimum(32 + np.exp(rng.normal(np.log(2500), 1.0, n)).astype(int), 20480)
    prompts = np.repeat(rng.integers(60, 400, n // 8), 8)
    siblings = np.arange(n) // 8 * 8 + rng.integers(0, 8, n)
    contexts = np.where(rng.uniform(size=n) < taught, lengths[siblings] + 30, 0)
    some = lambda count: np.ones(count, np.int32)
    return [
        packing.PackItem(
            prompt_tokens=some(p),
            response_tokens=some(r),
            sampler_logp=np.zeros(r, np.float32),
            weight=1.0,
            distill_weight=1.0,
            teacher_prompt_tokens=some(p + c) if c else None,
        )
        for p, r, c in zip(prompts, lengths, contexts, strict=True)
    ]


@pytest.mark.parametrize("taught", [0.4, 0.8, 1.0])
def test_waste_at_the_papers_size_is_at_most_a_tenth(taught):
    """Teacher rows that are half empty because responses without a teacher sit in them."""
    items = long_items(taught)
    # the rows that a run takes from the paper's limits: prompt, response, teacher's prompt
    fixed = packing.PackingSpec(1024, 1, 2048 + 20480, 22528 + 20480, 22528)
    for spec in (fixed, packing.choose_spec(items, micro_rows=1, row_len=22528)):
        assert_little_waste(items, spec)


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 4))
def test_rows_without_a_teacher_come_last(triples, micro_rows):
    """The step runs no teacher for the micro-batches after the last taught row."""
    items = make_items(*zip(*triples, strict=True))
    batch = packing.pack(items, packing.choose_spec(items, micro_rows=micro_rows))
    if batch.teacher is None:
        return
    taught = (batch.teacher.segment_ids > 0).any(-1).reshape(-1)
    assert not taught[taught.sum() :].any()
    # a response without a teacher has a row of its own only where it fits into no taught one
    alone = batch.mask.any(-1).reshape(-1) & ~taught
    if alone.any():
        room = batch.student.tokens.shape[-1] - (batch.student.segment_ids > 0).sum(-1).reshape(-1)
        slots = batch.mask.shape[-1] - batch.mask.sum(-1).reshape(-1)
        smallest = min(item.sizes[0] for item in items if item.teacher_prompt_tokens is None)
        assert not ((room >= smallest) & (slots >= smallest))[taught].any()


def test_buckets_are_few_and_reused():
    """A new shape, hence a new compilation, at every step."""
    known: list[packing.PackingSpec] = []
    for seed in range(12):
        items = skewed(128, seed)
        spec = packing.choose_spec(items, micro_rows=2, row_len=2304, known=known)
        packing.pack(items, spec)
        if spec not in known:
            known.append(spec)
    assert len(known) <= 3


def test_too_long_a_response_is_named():
    items = make_items([50], [10], [0])
    with pytest.raises(ValueError, match=r"config.batch.row_len"):
        packing.pack(items, packing.PackingSpec(1, 1, 32, 0, 32))


def test_old_logp_of_some_responses_only_is_refused():
    """Ratios against zeros for the responses that lack it."""
    items = make_items([3, 4], [2, 2], [0, 0])
    items[0] = dataclasses.replace(items[0], old_logp=items[0].sampler_logp)
    with pytest.raises(ValueError, match="old_logp"):
        packing.pack(items, packing.choose_spec(items, micro_rows=1))


def test_window_leaves_out_first_and_late_tokens():
    """skip_first applied to the policy term, or counted from the row's start."""
    items = make_items([6, 5], [2, 3], [4, 4])
    spec = packing.choose_spec(items, micro_rows=1, row_len=32)
    batch = packing.pack(items, spec, skip_first=2, prefix_len=4)
    distilled = batch.distill_weight[batch.mask] > 0
    np.testing.assert_array_equal(distilled, np.isin(batch.position[batch.mask], (2, 3)))
    assert (batch.weight[batch.mask] > 0).all()


def test_masks_come_from_lengths_not_from_token_ids():
    """A tokenizer whose pad token is its end token: id 0 ends a response and fills the rest."""
    items = [
        dataclasses.replace(item, response_tokens=np.zeros_like(item.response_tokens))
        for item in make_items([6, 1, 4], [2, 3, 2], [4, 0, 4])
    ]
    batch = packing.pack(items, packing.choose_spec(items, micro_rows=1))
    assert batch.mask.sum() == 11 and (batch.weight > 0).sum() == 11
    assert (batch.distill_weight > 0).sum() == 10


def test_unpack_returns_values_in_item_order():
    items = make_items([3, 7, 5], [2, 2, 2], [0, 4, 0])
    spec = packing.choose_spec(items, micro_rows=2)
    batch = packing.pack(items, spec)
    for item, tokens in zip(items, packing.unpack(batch.targets, batch, items, spec), strict=True):
        np.testing.assert_array_equal(item.response_tokens, tokens)


def test_hosts_agree_on_a_shape_with_room_for_all():
    specs = [packing.choose_spec(skewed(32, seed), micro_rows=1) for seed in (0, 1)]
    merged = specs[0].merge(specs[1])
    for seed in (0, 1):
        batch = packing.pack(skewed(32, seed), merged)
        assert batch.mask.shape == (merged.micro_batches, merged.micro_rows, merged.slots)


@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
def test_aggregations_by_hand(loss_agg):
    """Two responses of 1 and 3 tokens with losses 1 and 2 each, one of 2 tokens without teacher."""
    lengths, taught = np.array([1, 3, 2]), np.array([True, True, False])
    policy, distill = response_weights(lengths, taught, loss_agg, norm_n=10)
    value = float((distill * np.array([1.0, 6.0, 0.0])).sum())
    expected = {
        "rows-incl-masked": (1 + 2 + 0) / 3,
        "seq-mean-token-mean": (1 + 2) / 2,
        "seq-mean-token-sum": (1 + 6) / 2,
        "seq-mean-token-sum-norm": 7 / 10,
        "token-mean": 7 / 4,
        "labels-mean": 7 / 4,
        "labels-mean-unclamped": 7 / 4,
        "rows-fixed": 7 / 30,
        "row-sum-mean": 7 / 3,
    }[loss_agg]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert policy[2] > 0 and distill[2] == 0
