"""Times one optimizer step, GRPO and SDPO, beside a plain PyTorch step on the same workload.

    python benchmarks/step.py --ckpt DIR/small --lengths both --torch-python PY --peers DIR

The workload is the peers' (16 prompts of 64 tokens, responses of 192 or skewed lengths, 192 more
tokens in the teacher's prompt, float32). Prints one JSON line per engine, objective and kind of
lengths: median wall and CPU seconds of 5 repeats after the call that compiles, useful GFLOP/s, peak
memory of the process; each engine runs in a process of its own. `--torch-python` is an interpreter
with torch; without it only our lines are printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FIRST = 10  # first token id used in prompts; below are special tokens


def workload(vocab: int, batch: int, prompt: int, response: int, context: int, skewed: bool):
    """The peers' arrays: prompts, contexts, responses, advantages, response lengths."""
    draw = np.random.default_rng(0)
    tokens = lambda *shape: draw.integers(FIRST, vocab, shape)
    prompts, contexts = tokens(batch, prompt), tokens(batch, context)
    responses = tokens(batch, response)
    advantages = draw.standard_normal(batch).astype(np.float32)
    lengths = np.full(batch, response)
    if skewed:
        drawn = np.random.default_rng(1).exponential(40, batch).astype(int)
        lengths = np.minimum(16 + drawn, response)
    return prompts, contexts, responses, advantages, lengths


def pack_items(algo: str, arrays) -> list:
    """The workload as PackItems whose loss is the mean over all response tokens."""
    from sdjax.data.packing import PackItem

    prompts, contexts, responses, advantages, lengths = arrays
    items = []
    for i, n in enumerate(lengths):
        teacher = np.concatenate([prompts[i], contexts[i]]) if algo == "sdpo" else None
        items.append(
            PackItem(
                prompt_tokens=prompts[i],
                response_tokens=responses[i, :n],
                sampler_logp=np.zeros(n, np.float32),
                weight=1.0 / lengths.sum(),
                distill_weight=1.0 / lengths.sum(),
                advantage=float(advantages[i]),
                teacher_prompt_tokens=teacher,
            )
        )
    return items


def forward_flops(cfg, rows: int, tokens: int, head_tokens: int) -> float:
    """Matrix-product FLOPs of one forward pass; causal attention counted once."""
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    d = cfg.d_model
    body = cfg.n_layers * (2 * d * q + 2 * d * kv + 3 * d * cfg.d_ff)
    pairs = rows * tokens * (tokens + 1) / 2
    head = 2 * d * cfg.vocab_size * head_tokens
    return 2 * body * rows * tokens + 4 * cfg.n_layers * q * pairs + head


def useful_flops(cfg, algo: str, args: argparse.Namespace) -> float | None:
    """FLOPs of the step without recomputation or padding; None for skewed lengths."""
    if args.skewed:
        return None
    head_tokens = args.batch * args.response
    total = 3 * forward_flops(cfg, args.batch, args.prompt + args.response, head_tokens)
    if algo == "sdpo":
        length = args.prompt + args.context + args.response
        total += forward_flops(cfg, args.batch, length, head_tokens)
    return total


def run_ours(algo: str, args: argparse.Namespace) -> dict:
    """Our compiled step: median seconds over the repeats, after one call that compiles."""
    import jax

    from sdjax import parallel, step
    from sdjax.data import packing
    from sdjax.models import hf
    from sdjax.objectives import ObjectiveConfig
    from sdjax.optimizer import OptimizerConfig

    mesh = parallel.single_device_mesh()
    cfg, params = hf.load(args.ckpt, mesh)
    policy = {"pg_coef": 1.0, "distill_coef": 0.0, "dual_clip": float("inf")}
    objective = ObjectiveConfig(
        **(policy if algo == "grpo" else {}),
        rollout_is_clip=float("inf"),
        loss_agg="token-mean",
        with_entropy=args.entropy,
    )
    optimizer = OptimizerConfig(lr=1e-6, warmup_steps=0)
    state = step.init_state(params, objective, optimizer, mesh, "fixed")
    del params
    arrays = workload(
        cfg.vocab_size, args.batch, args.prompt, args.response, args.context, args.skewed
    )
    items = pack_items(algo, arrays)
    spec = packing.choose_spec(items, micro_rows=args.micro_rows, row_len=args.row_len)
    packed = packing.pack(items, spec)
    batch = step.put_batch(packed, mesh)
    scalars = step.StepScalars(knobs=objective.knobs())
    config = step.StepConfig(teacher_kind="fixed", remat=args.remat, chunk=args.chunk)
    train = step.make_train_step(cfg, objective, optimizer, mesh, config)

    def call():
        nonlocal state
        state, metrics = train(state, batch, scalars)
        return float(metrics["loss/total"])

    started = time.perf_counter()
    first_loss = call()
    first = time.perf_counter() - started
    runs = []
    for _ in range(args.reps):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
    seconds = float(np.median([w for w, _ in runs]))
    flops = useful_flops(cfg, algo, args)
    # read before the program is compiled once more, for the compiler's figure alone
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = train.lower(state, batch, scalars).compile().memory_analysis()
    return {
        "engine": f"sdjax-{algo}",
        "workload": f"{algo}{'-skewed' if args.skewed else ''}-b{args.batch}",
        "seconds": round(seconds, 3),
        "seconds_all": [round(w, 3) for w, _ in runs],
        "cpu_seconds": round(float(np.median([c for _, c in runs])), 3),
        "first_call_s": round(first, 2),
        "useful_gflops_per_s": flops and round(flops / seconds / 1e9, 1),
        "tokens_per_s": round((args.batch * args.prompt + arrays[4].sum()) / seconds, 1),
        "peak_rss_mb": round(peak / 1024),
        "temp_mb": round(memory.temp_size_in_bytes / 2**20),
        "loss": first_loss,
        "packing": {"rows": spec.rows, "row_len": spec.row_len} | packing.waste(packed),
        "load1": round(os.getloadavg()[0], 2),
        "backend": jax.default_backend(),
    }


def head_memory(vocab: int, width: int, tokens: tuple[int, ...], chunk: int) -> list[dict]:
    """The compiler's own figure for head, loss and gradient at several numbers of tokens."""
    import jax
    import jax.numpy as jnp

    from sdjax import head
    from sdjax.objectives import ObjectiveConfig, Slots

    config = ObjectiveConfig()
    out = []
    for n in tokens:
        array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
        slot = array(1, n)
        slots = Slots(array(1, n, dtype=jnp.int32), slot, slot, sampler_logp=slot)
        teacher = head.TeacherHead(hidden=array(1, n, width), weight=array(vocab, width))
        size = head.chunk_size(1, n, vocab, chunk)

        def loss(hidden, weight, teacher, slots, n=n, size=size):
            knobs = config.knobs()
            return head.head_loss(hidden, weight, teacher, slots, n, knobs, config, size)

        program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        args = (array(1, n, width), array(vocab, width), teacher, slots)
        memory = program.lower(*args).compile().memory_analysis()
        out.append(
            {
                "response_tokens": n,
                "chunk": size,
                "temp_mb": round(memory.temp_size_in_bytes / 2**20, 1),
                "full_logits_mb": round(4 * n * vocab / 2**20),
            }
        )
    return out


def head_products(vocab: int, width: int, tokens: int) -> dict:
    """What the parts of one head chunk take alone, best of 4: the machine's own limit."""
    import jax
    import jax.numpy as jnp

    from sdjax.objectives.partition import log_sum_exp

    weight, hidden = jnp.ones((vocab, width)), jnp.ones((tokens, width))
    logits = jax.random.normal(jax.random.key(0), (tokens, vocab))
    parts = {
        "logits": (lambda w, h: jnp.einsum("td,vd->tv", h, w), weight, hidden),
        "dhidden": (lambda w, x: jnp.einsum("tv,vd->td", x, w), weight, logits),
        "dweight": (lambda h, x: jnp.einsum("tv,td->vd", x, h), hidden, logits),
        "add_dweight": (jnp.add, weight, weight),
        "log_sum_exp": (log_sum_exp, logits),
        "log_sum_exp_gradient": (jax.grad(lambda x: log_sum_exp(x).sum()), logits),
        "plain_log_sum_exp": (lambda x: jax.nn.logsumexp(x, -1), logits),
    }
    out = {"engine": "head-products", "tokens": tokens}
    for name, (function, *given) in parts.items():
        program, seconds = jax.jit(function), []
        jax.block_until_ready(program(*given))
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds.append(time.perf_counter() - start)
        out[f"{name}_s"] = round(min(seconds), 4)
    return out


def run_torch(algo: str, args: argparse.Namespace) -> dict:
    """The peers' PyTorch step in its own process and interpreter."""
    command = [args.torch_python, str(Path(args.peers) / "torch_step.py"), "--ckpt", args.ckpt]
    command += ["--algo", algo, "--reps", str(args.reps), "--batch", str(args.batch)]
    command += ["--micro", str(args.torch_micro)] + (["--skewed"] if args.skewed else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = json.loads(done.stdout.strip().splitlines()[-1])
    line["engine"] = line.pop("peer")
    line["cpu_seconds"] = round(line["seconds"] * line["cpu_per_wall"], 3)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="", help="Hugging Face folder of the model")
    parser.add_argument(
        "--memory", action="store_true", help="only compile the head at 1k, 4k and 16k tokens"
    )
    parser.add_argument(
        "--products", action="store_true", help="only time the head's parts for 256, 512 tokens"
    )
    parser.add_argument("--algo", choices=("grpo", "sdpo", "both"), default="both")
    parser.add_argument(
        "--lengths",
        choices=("equal", "skewed", "both"),
        default="equal",
        help="of responses: all the same, 16 + Exp(40), or one after the other",
    )
    parser.add_argument("--entropy", action="store_true", help="also measure both entropies")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=192)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--row-len", type=int, default=512)
    parser.add_argument("--micro-rows", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--remat", default="dots", choices=("none", "dots", "full"))
    parser.add_argument("--torch-python", default="", help="an interpreter that has torch")
    parser.add_argument(
        "--torch-micro", type=int, default=16, help="sequences per torch micro-batch"
    )
    parser.add_argument("--peers", default="../shared/peers")
    args = parser.parse_args()
    if args.memory:
        for line in head_memory(151936, 512, (1024, 4096, 16384), args.chunk):
            print(json.dumps(line), flush=True)
        return
    if args.products:
        for tokens in (256, 512):
            print(json.dumps(head_products(151936, 512, tokens)), flush=True)
        return
    if not args.ckpt:
        parser.error("--ckpt is needed (or --memory, --products)")
    algos = ("grpo", "sdpo") if args.algo == "both" else (args.algo,)
    lengths = ("equal", "skewed") if args.lengths == "both" else (args.lengths,)
    for kind, algo in itertools.product(lengths, algos):
        args.skewed = kind == "skewed"
        if args.torch_python:
            print(json.dumps(run_torch(algo, args)), flush=True)
        if len(algos) * len(lengths) > 1:  # in its own process, so that peak memory is its own
            alone = ["--algo", algo, "--lengths", kind, "--torch-python", ""]  # the last ones count
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *alone], check=True)
        else:
            print(json.dumps(run_ours(algo, args)), flush=True)


if __name__ == "__main__":
    main()
