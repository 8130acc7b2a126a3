"""The engine against one-by-one decoding, and what it promises about slots, shapes and failures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import ENDS, ENGINE, MODEL, logits_of, make_requests, one_by_one

from sdjax.models import decoder
from sdjax.models.attention import reference_attention
from sdjax.models.rope import Rope
from sdjax.parallel import make_mesh, single_device_mesh
from sdjax.records import Request, SamplingParams
from sdjax.rollout import programs
from sdjax.rollout.engine import Engine
from sdjax.rollout.table import Table


def same(a, b) -> bool:
    """Whether two lists of completions have the same tokens in the same order."""
    key = lambda c: (c.request_id, c.index, c.finish_reason, c.tokens.tolist())
    return [key(c) for c in a] == [key(c) for c in b]


def test_slots_sample_what_one_by_one_decoding_samples(params, engine):
    """Catches wrong positions, stale cache columns, masks of refilled slots and shifted streams."""
    requests = make_requests(9, n=2)
    done = engine.generate(params, requests)
    assert [(c.request_id, c.index) for c in done] == [(i, j) for i in range(9) for j in range(2)]
    for completion in done[::3]:
        request = requests[completion.request_id]
        tokens, logps = one_by_one(params, request, completion.index)
        assert completion.tokens.tolist() == tokens
        np.testing.assert_allclose(completion.sampler_logp, logps, atol=1e-4)
        ended = tokens[-1] in ENDS
        assert completion.finish_reason == ("eos" if ended else "length")
        assert ended or len(tokens) == request.sampling.max_new_tokens


@pytest.mark.parametrize("sliding_theta", [None, 100.0])
def test_log_probabilities_agree_with_the_trainers_forward(params, engine, sliding_theta):
    """The drift that training logs is below 1e-4 in float32, in every response of a group."""
    model = MODEL
    if sliding_theta is not None:  # as olmo3 has it: sliding layers turn by their own frequencies
        model = dataclasses.replace(MODEL, rope_sliding=Rope(theta=sliding_theta))
        engine = Engine(model, ENGINE, single_device_mesh(), ENDS)
    requests = make_requests(6, seed=3, n=2, temperature=1.0, top_p=1.0, top_k=0)
    worst = 0.0
    for c in engine.generate(params, requests):
        prompt = requests[c.request_id].prompt_tokens
        row_1T = np.zeros((1, 64), np.int32)
        row_1T[0, : len(prompt) + len(c.tokens)] = [*prompt, *c.tokens]
        logp_TV = jax.nn.log_softmax(logits_of(params, row_1T, model)[0])
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(c.tokens))
        worst = max(worst, float(np.abs(logp_TV[places, c.tokens] - c.sampler_logp).max()))
        np.testing.assert_array_equal(c.sampler_logp, c.truncated_logp)
    assert worst < 1e-4


def test_tokens_do_not_depend_on_slots_or_order(params, engine):
    """The same request gives the same tokens among other neighbours and in other slots."""
    requests = make_requests(8, seed=1, n=2)
    together = engine.generate(params, requests)
    order = {r.id: i for i, r in enumerate(requests)}
    reverse = engine.generate(params, requests[::-1])
    assert same(together, sorted(reverse, key=lambda c: (order[c.request_id], c.index)))


def test_tokens_do_not_depend_on_the_mesh(params, engine):
    """Rows over data, heads and vocabulary over tensor."""
    requests = make_requests(6, seed=2, n=1)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    cfg = dataclasses.replace(ENGINE, first_length=64)
    sharded = Engine(MODEL, cfg, mesh, ENDS)
    assert same(engine.generate(params, requests), sharded.generate(params, requests))


@pytest.mark.parametrize(
    "change",
    [
        dict(chunk=3, first_length=64),
        dict(chunk=20),  # longer than the sliding window
        dict(slots=8, row_halvings=1, refill_fraction=0.5),
        dict(prefill_tokens=16),
    ],
)
def test_tokens_do_not_depend_on_chunks_or_batches(params, engine, change):
    """Other chunk lengths, cache buckets, numbers of slots and moments of refilling."""
    other = Engine(MODEL, dataclasses.replace(ENGINE, **change), single_device_mesh(), ENDS)
    requests = make_requests(7, seed=8, n=2)
    assert same(engine.generate(params, requests), other.generate(params, requests))


@pytest.mark.parametrize("devices", [1, 2])
def test_tokens_do_not_depend_on_the_layout_of_the_weights(params, engine, devices, monkeypatch):
    """Output first, as large models have them on a CPU: every axis of every matrix is turned."""
    monkeypatch.setattr(decoder, "OUTPUT_FIRST_ENTRIES", 0)
    mesh = make_mesh(tensor=devices, devices=jax.devices()[:devices])
    turned = Engine(MODEL, ENGINE, mesh, ENDS)
    assert turned.static.output_first and not engine.static.output_first
    requests = make_requests(6, seed=4)
    assert same(engine.generate(params, requests), turned.generate(params, requests))


def test_a_vocabulary_that_does_not_split_over_the_mesh():
    """OLMo-3's 100,278 entries over 4 devices: the weights stay whole, the tokens the same."""
    model = dataclasses.replace(MODEL, vocab_size=163)
    params = decoder.init_params(model, jax.random.key(5))
    mesh = make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    requests = make_requests(3, seed=6)
    one, two = (Engine(model, ENGINE, m, ENDS) for m in (single_device_mesh(), mesh))
    assert same(one.generate(params, requests), two.generate(params, requests))


def test_no_compilation_after_the_warm_up(params):
    """The list of programs is known: rows x lengths x prompts, and the steps between them."""
    cfg = dataclasses.replace(
        ENGINE, slots=2, max_prompt_len=9, max_new_tokens=14, prefill_tokens=16, row_halvings=1
    )
    engine = Engine(MODEL, cfg, single_device_mesh(), ENDS)
    assert (engine.buckets.rows, engine.buckets.lengths) == ((1, 2), (32,))
    assert engine.buckets.prefills == ((1, 8), (2, 8), (1, 16))
    # empty and decode for both row counts, three shapes of prefill, insert of each into either, one
    # resize to fewer rows
    expected = 2 * 2 + 3 + 2 * 3 + 1
    assert engine.warm_up(params) == expected == engine.compilations
    requests = make_requests(12, seed=4, max_new_tokens=14)
    done = engine.generate(params, requests)
    assert len(done) + engine.stats()["dropped"] == 12 and len(done) > 5
    engine.generate(params, requests[:1])  # one response: starts with fewer slots
    assert engine.compilations == expected


def test_a_step_of_a_chunk_computes_no_cosines(params, engine):
    """In the loop XLA would compute them for every head of every layer: they come from outside."""
    layers = [engine._empty(4, 32) for _ in range(MODEL.n_layers)]
    args = engine.prepare(params).params, layers, Table(4).slots(ENGINE.chunk), np.int32(4)
    traced = jax.make_jaxpr(functools.partial(programs.decode, static=engine.static))(*args)
    (loop,) = [e for e in traced.eqns if e.primitive.name == "while"]
    assert " cos " in str(traced) and " cos " not in str(loop.params["body_jaxpr"])


def _long(i: int) -> Request:
    return Request(i, (5, 6, 7), 1, SamplingParams(max_new_tokens=28, temperature=2.0))


def test_group_shares_one_prefill(params, engine):
    engine.reset_stats()
    engine.generate(params, [Request(0, tuple(range(3, 19)), 4, SamplingParams(max_new_tokens=2))])
    assert engine.stats()["prompt_tokens"] == 15  # the last token is decoded


def test_forced_prefix_is_written_and_scored(params, engine):
    """An end token inside the prefix does not stop it; sampling goes on behind it."""
    forced = (5, ENDS[0], 7, 8, 9, 10, 11, 12, 13, 14)  # longer than a chunk
    request = Request(3, (4, 5, 6), 2, SamplingParams(max_new_tokens=14, top_k=2), forced)
    for completion in engine.generate(params, [request]):
        tokens, logps = one_by_one(params, request, completion.index)
        assert tuple(tokens[:10]) == forced and len(tokens) > 10
        assert completion.tokens.tolist() == tokens
        np.testing.assert_allclose(completion.sampler_logp, logps, atol=1e-4)


def test_finished_responses_leave_while_others_are_sampled(params, engine):
    """`on_finish` sees each response once, before the call returns, short ones first."""
    requests = [
        _long(0),
        *(
            dataclasses.replace(_long(i), sampling=SamplingParams(max_new_tokens=2))
            for i in range(1, 9)
        ),
    ]
    seen = []
    done = engine.generate(params, requests, on_finish=lambda c: seen.append(c.request_id))
    assert sorted(seen) == list(range(9)) == [c.request_id for c in done]
    assert seen[0] != 0
    pieces = {}
    collect = lambda i, j, tokens: pieces.setdefault((i, j), []).extend(tokens.tolist())
    done = engine.generate(params, requests, on_tokens=collect)
    assert all(pieces[c.request_id, c.index] == c.tokens.tolist() for c in done)


def test_requests_may_arrive_while_sampling(params, engine):
    """A generator that yields None has nothing for now; the result is that of the whole list."""
    requests = make_requests(7, seed=5)

    def arrivals():
        for request in requests:
            yield None
            yield request

    assert same(engine.generate(params, arrivals()), engine.generate(params, requests))


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_long_prompts_are_counted_not_fatal(params, engine, policy):
    cfg = dataclasses.replace(ENGINE, on_long_prompt=policy)
    engine.reset_stats()
    engine.cfg, before = cfg, engine.cfg
    try:
        prompt = tuple(range(3, 40))
        long, short = (
            Request(i, p, 1, SamplingParams(max_new_tokens=3))
            for i, p in enumerate([prompt, prompt[-16:]])
        )
        done = engine.generate(params, [long, short])
    finally:
        engine.cfg = before
    stats = engine.stats()
    if policy == "drop":
        assert [c.request_id for c in done] == [1] and stats["dropped"] == 1
    else:
        assert [c.request_id for c in done] == [0, 1] and stats["truncated_prompts"] == 1
        expected = dataclasses.replace(long, prompt_tokens=prompt[-16:])
        assert same(done[:1], engine.generate(params, [expected]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt_tokens=()), "empty prompt"),
        (
            dict(sampling=SamplingParams(max_new_tokens=29)),
            "asks for 29 new tokens.*max_new_tokens",
        ),
        (dict(forced_prefix=(3,) * 50), "forces 50 tokens"),
        (dict(sampling=SamplingParams(max_new_tokens=5, top_p=1.5)), "impossible settings"),
        (dict(sampling=SamplingParams(float("nan"), max_new_tokens=5)), "impossible settings"),
        (dict(sampling=SamplingParams(top_k=2**31, max_new_tokens=5)), "impossible settings"),
        (dict(n=0), "n=0 responses"),
        (dict(prompt_tokens=(3, MODEL.vocab_size)), "has token 160.*ends at 159"),
        (dict(forced_prefix=(3, -1)), "has token -1"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(params, engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(params, [dataclasses.replace(_long(0), **change)])


def test_duplicate_ids_are_refused(params, engine):
    with pytest.raises(ValueError, match="given twice"):
        engine.generate(params, [_long(1), _long(1)])


def test_nan_logits_stop_with_step_and_request_named(params, engine):
    broken = params | {"embed": params["embed"].at[50].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="training step 12: .* token 0 .* request 7 "):
        engine.generate(broken, [_long(7)], step=12)


def _logits_of_an_int8_cache(params, tokens_1T, prompt: int):
    """Logits of a row whose tokens from the prompt's last one on read keys and values in int8."""
    index_1T = jnp.arange(tokens_1T.shape[1])[None]
    segment_1T = jnp.ones_like(index_1T)

    def rounded(x):
        scale = jnp.abs(x).max(-1, keepdims=True) / 127
        return jnp.round(x / scale) * scale

    def attend(q, k, v, state, window):
        over = lambda k, v: reference_attention(q, k, v, segment_1T, segment_1T, window=window)
        decoded = (index_1T >= prompt - 1)[..., None, None]
        return jnp.where(decoded, over(rounded(k), rounded(v)), over(k, v)), state

    hidden_1TD, _ = decoder.forward(params, tokens_1T, index_1T, MODEL, attend=attend)
    return decoder.logits(params, hidden_1TD, MODEL)[0]


def test_int8_cache_is_the_exact_one_with_rounded_entries(params):
    """Catches a wrong scale, a scale of another token or head, and tokens that are not rounded."""
    requests = make_requests(4, seed=6, temperature=1.0, top_p=1.0, top_k=0)
    cfg = dataclasses.replace(ENGINE, cache_dtype="int8", first_length=64)
    for c in Engine(MODEL, cfg, single_device_mesh(), ENDS).generate(params, requests):
        prompt = requests[c.request_id].prompt_tokens
        row_1T = jnp.asarray([[*prompt, *c.tokens]])
        logp_TV = jax.nn.log_softmax(_logits_of_an_int8_cache(params, row_1T, len(prompt)))
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(c.tokens))
        np.testing.assert_allclose(c.sampler_logp, logp_TV[places, c.tokens], atol=1e-4)


def test_int8_cache_reports_a_small_logit_error(params, engine):
    """int8 keys and values move log-probabilities a little: more than nothing, less than 0.15."""
    requests = make_requests(4, seed=6, temperature=1.0)
    cfg = dataclasses.replace(ENGINE, cache_dtype="int8", first_length=64)
    quantised = Engine(MODEL, cfg, single_device_mesh(), ENDS)
    exact = engine.generate(params, requests)
    forced = [
        dataclasses.replace(r, forced_prefix=tuple(c.tokens.tolist()))
        for r, c in zip(requests, exact, strict=True)
    ]
    errors = [
        np.abs(a.sampler_logp[: len(b.sampler_logp)] - b.sampler_logp[: len(a.sampler_logp)])
        for a, b in zip(exact, quantised.generate(params, forced), strict=True)
    ]
    errors = np.concatenate(errors)
    assert 1e-6 < errors.max() < 0.15 and errors.mean() < 0.02
