"""Times the bare products of sampling, nothing else: what bounds the engine in `rollout.py`.

Of a decode step, of prompts and of the sampler. The products are the engine's own, in its layout.
"""

import functools
import statistics
import time

import numpy as np

BARE_STEPS = 8  # of bare products, in one compiled loop
PROMPT_TOKENS = 512  # in a batch of bare products of prompts


def timed(run, reps: int, warm=None):
    """Wall and CPU seconds of `reps` calls after one that compiles (`warm`, or a call as well)."""
    start = time.perf_counter()
    (warm or run)()
    first, out = time.perf_counter() - start, []
    for _ in range(reps):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        out.append((time.perf_counter() - wall, time.process_time() - cpu))
    return first, out


def mix(cfg, layer, x_B1D, attend):
    """One layer's matrix products, without norms, rotations and activations."""
    from sdjax.models.decoder import gate_and_up, product, query_key_value

    q_B1HC, k_B1NC, v_B1NC = query_key_value(x_B1D, layer, cfg)
    q_B1HC = q_B1HC + k_B1NC.sum() + v_B1NC.sum()
    x_B1D = x_B1D + product(attend(q_B1HC), layer, "w_o", "bthc,hcd->btd")
    gate, up = gate_and_up(x_B1D, layer)
    return x_B1D + product(gate * up, layer, "w_down", "btf,fd->btd")


def repeated(body, count: int):
    """A compiled loop of `count` calls of body(weights, x) -> x: new memory is touched only once.

    A head product of 64 rows alone takes a fifth longer: its 39 MB of logits are new pages.
    """
    import jax

    return jax.jit(lambda weights, x: jax.lax.fori_loop(0, count, lambda _, x: body(weights, x), x))


def small(x_B1D):
    """The next call's input: without norms a loop of products would soon over- or underflow."""
    return x_B1D / abs(x_B1D).max() * 1e-3


def prompt_seconds(cfg, layers, tokens: int) -> float:
    """Seconds of the bare products of this many prompt tokens, without attention; best of 5."""
    import jax
    import jax.numpy as jnp

    def products(layers, x_B1D):
        for layer in layers:
            x_B1D = mix(cfg, layer, x_B1D, lambda q_B1HC: q_B1HC)
        return small(x_B1D)

    x_B1D = jnp.full((PROMPT_TOKENS, 1, cfg.d_model), 1e-3)
    run = repeated(products, BARE_STEPS)
    _, runs = timed(lambda: jax.block_until_ready(run(layers, x_B1D)), 5)
    return min(wall for wall, _ in runs) * tokens / (BARE_STEPS * PROMPT_TOKENS)


def time_step(params, cfg, rows: int, seen: int, weight_left: bool):
    """(first, runs) of the bare products of one step; each row reads `seen` cached tokens."""
    import jax
    import jax.numpy as jnp

    from sdjax.models import decoder

    N, C = cfg.n_kv_heads, cfg.head_dim
    caches = [
        (jnp.ones((rows, N, C, seen)), jnp.ones((rows, N, seen, C))) for _ in range(cfg.n_layers)
    ]

    def products(weights, x_B1D):
        params, caches = weights
        for layer, (k, v) in zip(params["layers"], caches, strict=True):

            def attend(q_B1HC, k=k, v=v):
                q_BNGC = q_B1HC.reshape(rows, N, -1, C)
                score = jnp.einsum("bngc,bncs->bngs", q_BNGC, k)
                return jnp.einsum("bngs,bnsc->bngc", score, v).reshape(q_B1HC.shape)

            x_B1D = mix(cfg, layer, x_B1D, attend)
        if weight_left:
            logit_B = decoder.vocab_first_logits(params, x_B1D[:, 0], cfg)[0]
        else:
            logits_B1V = jax.lax.optimization_barrier(decoder.logits(params, x_B1D, cfg))
            logit_B = logits_B1V[:, 0, 0]
        return small(x_B1D + logit_B[:, None, None])  # so that the next step needs this one

    x_B1D = jnp.full((rows, 1, cfg.d_model), 1e-3)
    run = repeated(products, BARE_STEPS)
    first, runs = timed(lambda: jax.block_until_ready(run((params, caches), x_B1D)), 10)
    return first, [(wall / BARE_STEPS, cpu / BARE_STEPS) for wall, cpu in runs]


def median_wall(runs) -> float:
    """Of `timed`'s (wall, CPU) pairs."""
    return statistics.median(wall for wall, _ in runs)


def sequential_seconds(lengths: np.ndarray, step_s: dict[int, float]) -> float:
    """Bare products when all responses start at once and each step has only the live rows.

    `step_s` are seconds of a step by its rows; live rows take the cheapest step that holds them. A
    response's tokens come one after the other, so with few long ones left the weights are read for
    few rows, whatever the schedule.
    """
    slots = max(step_s)
    live_T = (lengths[None] > np.arange(lengths.max())[:, None]).sum(1)
    cheapest = lambda live: min(s for rows, s in step_s.items() if rows >= live)
    full_T, rest_T = np.divmod(live_T, slots)  # more rows than slots: several full steps
    rest_s = sum(cheapest(rest) for rest in rest_T if rest)
    return float(full_T.sum() * step_s[slots] + rest_s)


def sampler_seconds(rows: int, vocab: int) -> float:
    """Median seconds of drawing one token per row at temperature 1."""
    import jax
    import jax.numpy as jnp

    from sdjax.rollout import sampling

    settings = sampling.Settings(
        jnp.ones(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows), jnp.zeros(rows)
    )
    draw = jax.jit(functools.partial(sampling.sample, by_row=True, rows_last=True))
    logits_VB, uniform_B2 = jnp.ones((vocab, rows)), jnp.full((rows, 2), 0.5)
    run = lambda: jax.block_until_ready(draw(logits_VB, settings, uniform_B2))
    return statistics.median(wall for wall, _ in timed(run, 20)[1])
