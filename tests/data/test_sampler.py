"""The sampler: exact resume, each problem once per epoch, nested subsets, processes that agree."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.data.problems import ProblemSampler
from sdjax.records import Problem


def make(n, batch, seed=0, subset=None):
    problems = [Problem(id=str(i), prompt=f"Q{i}", answer=str(i)) for i in range(n)]
    return ProblemSampler(problems, batch, seed, subset)


def ids(problems):
    return [p.id for p in problems]


SIZES = {"n": st.integers(1, 40), "batch": st.integers(1, 50), "seed": st.integers(0, 2**31 - 1)}


@settings(max_examples=150, deadline=None)
@given(**SIZES, steps=st.integers(1, 6))
def test_every_epoch_holds_every_problem_once(n, batch, seed, steps):
    """Catches a dropped last batch, a skipped draw at the seam, a repeated permutation index."""
    sampler = make(n, batch, seed)
    stream = [i for step in range(steps) for i in ids(sampler.batch(step))]
    assert len(stream) == steps * batch
    for start in range(0, len(stream) - n + 1, n):
        assert set(stream[start : start + n]) == {str(i) for i in range(n)}


@settings(max_examples=100, deadline=None)
@given(**SIZES, step=st.integers(0, 10_000))
def test_a_batch_is_a_pure_function_of_the_step(n, batch, seed, step):
    """A resumed run asks for step 73 first; the answer may not depend on what was asked before."""
    used = make(n, batch, seed)
    used.batch(3)
    used.batch(step + 1)
    assert ids(used.batch(step)) == ids(make(n, batch, seed).batch(step))


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 40),
    share=st.integers(1, 8),
    processes=st.sampled_from([1, 2, 4, 8]),
    step=st.integers(0, 50),
)
def test_the_processes_shares_make_the_batch(n, share, processes, step):
    """Two hosts must not train on the same rows, and the batch may not depend on their number."""
    sampler = make(n, share * processes)
    joined = [i for k in range(processes) for i in ids(sampler.batch(step, k, processes))]
    assert joined == ids(sampler.batch(step))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 1000), data=st.data())
def test_subsets_of_one_seed_are_nested(n, seed, data):
    """The paper's |D| = 1 in 8 in 64 ...: a larger set adds questions and keeps the others."""
    small = data.draw(st.integers(1, n - 1))
    large = data.draw(st.integers(small, n))
    chosen = [{p.id for p in make(n, 4, seed, size).problems} for size in (small, large)]
    assert len(chosen[0]) == small and chosen[0] <= chosen[1]


def test_one_question_fills_the_batch():
    """METHODS 6.6: at |D| = 1 the batch is 64 groups of the same question, in every step."""
    sampler = make(100, 64, subset=1)
    batches = [ids(sampler.batch(step)) for step in range(3)]
    assert all(len(b) == 64 and set(b) == set(batches[0]) for b in batches)
    assert len(set(batches[0])) == 1


def test_eight_questions_fill_the_batch_evenly():
    assert set(Counter(ids(make(100, 64, subset=8).batch(5))).values()) == {8}


def test_epochs_and_seeds_differ():
    sampler = make(200, 200)
    assert ids(sampler.batch(0)) != ids(sampler.batch(1))
    assert ids(sampler.batch(0)) != ids(make(200, 200, seed=1).batch(0))
    assert ids(sampler.batch(0)) != [str(i) for i in range(200)]
    assert sampler.epoch(3) == 3.0


def test_the_order_is_that_of_published_runs():
    """Changing the stream would break every resumed run: this is the contract with checkpoints."""
    sampler = make(10, 6, seed=7)
    assert sampler.indices(0) + sampler.indices(1) == [1, 5, 3, 4, 6, 9, 0, 8, 2, 7, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "no problems"), ((3, 0), "batch_size"), ((3, 4, 0, 5), "subset_size is 5")],
)
def test_mistakes_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


def test_an_uneven_split_over_processes_is_refused():
    with pytest.raises(ValueError, match="does not split over 3 processes"):
        make(3, 4).batch(0, 0, 3)
