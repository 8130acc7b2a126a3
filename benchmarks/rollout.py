"""Useful response tokens per second of the sampling engine, beside transformers and the machine.

    python benchmarks/rollout.py [--ckpt random SMOLLM2_DIR]

measures each checkpoint (`random`: written here, Qwen3 with 8 layers, D 512, V 151,936, tied) and
prints one JSON line per engine, each measured in a process of its own:

    limit          the bare matrix products and cache reads of the useful tokens, nothing else: as
                   if all steps were full, and (`sequential_s`) with as many rows at each step as
                   responses are still to be continued; neither has the prompts' products, which
                   `prompts_s` is; `longest_s` is what the longest response takes alone,
                   `sampler_ms` what drawing tokens costs
    sdjax          the engine: slots refilled from the queue
    longest        the same programs without refill: batches that run to their longest response
    equal          the engine when all responses are equally long, beside `ideal_s`: as many full
                   steps as the tokens need, each as long as in the same run, and the bare matrix
                   products of prompts without padding
    transformers   `generate` on PyTorch, at the fastest of --torch-batches
    summary        the ratios that are asked for, and what share of the time goes where
    int8           only when named by --engine: what an int8 cache changes, as the log-probabilities
                   of the same tokens under both

The workload is `--requests` random prompts of 16 to 64 tokens and log-normal response lengths with
median 32, cut at 256; temperature 1, no end token, float32. `seconds` is the median of `reps` runs
after what compiles. Neighbours on the machine disturb wall time, so every line also has the CPU
seconds of the whole process (`cpu_s`), and `tokens_per_cpu_s`. `sampling_mb` is the weights and
what the process holds at most during the timed runs beyond what it held idle before them: cache,
prefilled prompts and temporaries, without the interpreter and the compiled programs, which
`idle_mb` and `runs_peak_mb` include.
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from bare_products import (
    median_wall,
    prompt_seconds,
    sampler_seconds,
    sequential_seconds,
    time_step,
    timed,
)

FIRST_ID = 10
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48)  # of the limit's steps, below the number of slots


def workload(vocab: int, count: int, median: int, longest: int, equal: bool):
    """Prompts as lists of ids, and the length of each response."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(FIRST_ID, vocab, rng.integers(16, 65)).tolist() for _ in range(count)]
    lengths = np.clip(np.round(median * np.exp(rng.normal(size=count))), 1, longest).astype(int)
    lengths[-1] = longest
    return prompts, np.full(count, median) if equal else lengths


def random_checkpoint(folder: str) -> str:
    """Writes the checkpoint that the targets name, with random weights."""
    import jax

    from sdjax.models import decoder, hf
    from sdjax.models.config import ModelConfig

    cfg = ModelConfig("qwen3", 151936, 512, 8, 8, 4, 64, 1536, qk_norm="head", tie_embeddings=True)
    hf.save(folder, cfg, decoder.init_params(cfg, jax.random.key(0)), dtype="float32")
    return folder


def memory_mb(name: str) -> float:
    """A field of this process's memory: VmRSS now, VmHWM at its peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def idle_mb() -> float:
    """Memory of this process once unused pages are given back; VmHWM starts anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def report(engine: str, args, runs, first: float, tokens: int, **extra) -> None:
    """Prints the JSON line of an engine."""
    wall = statistics.median(w for w, _ in runs)
    cpu = statistics.median(c for _, c in runs)
    line = dict(
        engine=engine,
        ckpt=pathlib.Path(args.ckpt).name,
        requests=args.requests,
        useful_tokens=int(tokens),
        seconds=round(wall, 3),
        seconds_all=[round(w, 3) for w, _ in runs],
        cpu_s=round(cpu, 3),
        tokens_per_s=round(tokens / wall, 1),
        tokens_per_cpu_s=round(tokens / cpu, 1),
        first_s=round(first, 1),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        load1=round(os.getloadavg()[0], 1),
    )
    print(json.dumps(line | extra), flush=True)


def setup(args, equal: bool, cache_dtype: str = "auto"):
    """Engine, weights and requests of the workload."""
    import jax

    from sdjax.models import hf
    from sdjax.parallel import single_device_mesh
    from sdjax.records import Request, SamplingParams
    from sdjax.rollout import Engine, EngineConfig

    cfg, params = hf.load(args.ckpt)
    prompts, lengths = workload(cfg.vocab_size, args.requests, args.median, args.longest, equal)
    engine = Engine(
        cfg,
        EngineConfig(
            slots=args.slots,
            max_prompt_len=64,
            max_new_tokens=args.longest,
            chunk=args.chunk,
            row_halvings=args.row_halvings,
            cache_dtype=cache_dtype,
        ),
        single_device_mesh(),
        end_token_ids=[],
    )
    weights = engine.prepare(params)
    jax.block_until_ready(weights.params)
    del params
    requests = [
        Request(i, tuple(prompt), 1, SamplingParams(max_new_tokens=int(length)))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    return engine, weights, requests, int(lengths.sum())


def sizes_mb(engine, weights) -> tuple[float, float]:
    """Megabytes of the weights and of the cache at its largest."""
    import jax

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.params)) / 2**20
    return size, engine.spec.nbytes(engine.cfg.slots, engine.buckets.lengths[-1]) / 2**20


def memory_line(engine, weights, idle: float) -> dict:
    """What the runs since `idle_mb` have needed, beside weights and cache."""
    size, cache = sizes_mb(engine, weights)
    peak = memory_mb("VmHWM")
    used = size + peak - idle
    return dict(
        weights_mb=round(size),
        cache_mb=round(cache),
        sampling_mb=round(used),
        of_weights_and_cache=round(used / (size + cache), 3),
        idle_mb=round(idle),
        runs_peak_mb=round(peak),
    )


def run_sdjax(args, equal=False) -> None:
    engine, weights, requests, tokens = setup(args, equal)
    seen, idle = [], []

    def run():
        engine.reset_stats()
        assert sum(len(c.tokens) for c in engine.generate(weights, requests)) == tokens
        seen.append(engine.stats())

    first, runs = timed(run, args.reps, warm=lambda: (run(), idle.append(idle_mb())))
    stats = {name: statistics.median(s[name] for s in seen[1:]) for name in seen[1]}
    keep = ("occupancy", "steps", "decode_s", "prefill_s", "compilations")
    extra = {name: round(stats[name], 3) for name in keep} | memory_line(engine, weights, idle[0])
    step = stats["decode_s"] / stats["steps"]
    extra["step_ms"] = round(step * 1e3, 2)
    if equal:
        cached = sum(len(r.prompt_tokens) - 1 for r in requests)
        prefill = prompt_seconds(engine.model_cfg, weights.params["layers"], cached)
        ideal = tokens / args.slots * step + prefill
        extra |= dict(ideal_s=round(ideal, 3), ideal_prefill_s=round(prefill, 3))
        extra |= dict(of_ideal=round(ideal / stats["seconds"], 3))
    report("equal" if equal else "sdjax", args, runs, first, tokens, slots=args.slots, **extra)


def run_longest(args) -> None:
    args.row_halvings = 0
    engine, weights, requests, tokens = setup(args, equal=False)
    batches = [requests[i : i + args.slots] for i in range(0, len(requests), args.slots)]

    def run():
        engine.reset_stats()
        done = [c for batch in batches for c in engine.generate(weights, batch)]
        assert sum(len(c.tokens) for c in done) == tokens

    first, runs = timed(run, args.reps, warm=lambda: engine.warm_up(weights))
    occupancy = round(engine.stats()["occupancy"], 3)
    report("longest", args, runs, first, tokens, slots=args.slots, occupancy=occupancy)


def run_limit(args) -> None:
    """Times the bare products of a step, and charges the useful tokens for it in two ways.

    As if every step were full (`seconds`), and as few rows as are left at each (`sequential_s`).
    The weights stand on the left of every product, as the engine has them on a CPU; plain x W is
    slower (`plain_step_ms`).
    """
    from sdjax.models import decoder, hf

    cfg, params = hf.load(args.ckpt)
    prompts, lengths = workload(cfg.vocab_size, args.requests, args.median, args.longest, False)
    params = decoder.unstack_layers(params, cfg)
    # cached tokens that a useful token reads on average
    live = [np.arange(len(p), len(p) + n) for p, n in zip(prompts, lengths, strict=True)]
    seen = round(float(np.concatenate(live).mean()))
    plain = median_wall(time_step(params, cfg, args.slots, seen, False)[1])
    params["layers"] = tuple(map(decoder.output_first, params["layers"]))
    first, runs = time_step(params, cfg, args.slots, seen, True)
    step_s = {args.slots: median_wall(runs)}
    for rows in (n for n in ROWS if n < args.slots):
        step_s[rows] = median_wall(time_step(params, cfg, rows, seen, True)[1])
    tokens = int(lengths.sum())
    runs = [(wall * tokens / args.slots, cpu * tokens / args.slots) for wall, cpu in runs]
    extra = dict(step_ms=round(step_s[args.slots] * 1e3, 2), plain_step_ms=round(plain * 1e3, 2))
    extra["step_ms_by_rows"] = {rows: round(step_s[rows] * 1e3, 1) for rows in sorted(step_s)}
    cached = sum(len(prompt) - 1 for prompt in prompts)
    extra["prompts_s"] = round(prompt_seconds(cfg, params["layers"], cached), 3)
    extra["sequential_s"] = round(sequential_seconds(lengths, step_s), 3)
    extra["longest_s"] = round(step_s[1] * int(lengths.max()), 3)
    extra["sampler_ms"] = round(sampler_seconds(args.slots, cfg.vocab_size) * 1e3, 2)
    report("limit", args, runs, first, tokens, slots=args.slots, cached_tokens=seen, **extra)


def run_int8(args) -> None:
    """Samples with a float32 cache, then forces the same tokens on an int8 one."""
    engine, weights, requests, tokens = setup(args, equal=False)
    exact = engine.generate(weights, requests)
    small = setup(args, equal=False, cache_dtype="int8")[0]
    forced = [
        dataclasses.replace(request, forced_prefix=tuple(done.tokens))
        for request, done in zip(requests, exact, strict=True)
    ]
    pairs = zip(exact, small.generate(weights, forced), strict=True)
    errors = np.concatenate([np.abs(a.sampler_logp - b.sampler_logp) for a, b in pairs])
    line = dict(
        engine="int8",
        ckpt=pathlib.Path(args.ckpt).name,
        tokens=int(tokens),
        cache_mb=round(sizes_mb(small, weights)[1]),
        float32_cache_mb=round(sizes_mb(engine, weights)[1]),
        logp_error_mean=round(float(errors.mean()), 5),
        logp_error_p99=round(float(np.quantile(errors, 0.99)), 5),
        logp_error_max=round(float(errors.max()), 5),
    )
    print(json.dumps(line), flush=True)


def run_transformers(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    vocab = model.config.vocab_size
    prompts, lengths = workload(vocab, args.requests, args.median, args.longest, False)

    class Stop(StoppingCriteria):
        def __init__(self, width, wanted):
            self.width, self.wanted = width, torch.as_tensor(wanted)

        def __call__(self, ids, scores, **kwargs):
            return ids.shape[1] - self.width >= self.wanted

    def run(size):
        for start in range(0, len(prompts), size):
            batch, wanted = (x[start : start + size] for x in (prompts, lengths))
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(max(wanted)),
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([Stop(width, wanted)]),
            )
            assert out.shape[1] - width == max(wanted)

    tokens = int(lengths.sum())
    with torch.inference_mode():
        once = {
            size: timed(lambda: None, 1, lambda size=size: run(size))[0]
            for size in args.torch_batches
        }
        best = min(once, key=once.get)
        _, runs = timed(lambda: run(best), args.reps, warm=lambda: None)  # warm from the search
    tried = {str(size): round(tokens / seconds, 1) for size, seconds in once.items()}
    report("transformers", args, runs, once[best], tokens, batch=best, tried_tokens_per_s=tried)


def summary(lines: dict[str, dict]) -> dict:
    """The targets with what was measured, and where the engine's time goes."""
    ours, speed = lines["sdjax"], lambda name: lines[name]["tokens_per_s"]
    full, prompts = lines["limit"]["seconds"], lines["limit"]["prompts_s"]
    sequential = lines["limit"]["sequential_s"] + prompts
    found = [("of_limit", full / ours["seconds"], 0.5)]
    found += [("of_limit_with_prompts", (full + prompts) / ours["seconds"], 0.5)]
    found += [("of_sequential_limit", sequential / ours["seconds"], 0.5)]
    found += [("of_ideal_equal_lengths", lines["equal"]["of_ideal"], 0.9)]
    found += [("times_run_to_longest", speed("sdjax") / speed("longest"), 2.0)]
    found += [("memory_of_weights_and_cache", ours["of_weights_and_cache"], 1.3)]
    if "transformers" in lines:
        found += [("times_transformers", speed("sdjax") / speed("transformers"), 4.0)]
    out = dict(engine="summary", ckpt=ours["ckpt"])
    out["at_most_of_limit"] = round(full / sequential, 3)  # for an engine without any overhead
    for name, value, target in found:
        met = value <= target if name.startswith("memory") else value >= target
        out[name] = dict(value=round(value, 3), target=target, met=met)
    share = lambda seconds: round(seconds / ours["seconds"], 3)
    out["time"] = dict(
        prefill=share(ours["prefill_s"]),
        decode=share(ours["decode_s"]),
        host=share(ours["seconds"] - ours["prefill_s"] - ours["decode_s"]),
        slot_steps_useful=ours["occupancy"],
        full_step_ms=lines["equal"]["step_ms"],
        bare_products_ms=lines["limit"]["step_ms"],
        sampler_ms=lines["limit"]["sampler_ms"],
    )
    return out


ENGINES = {
    "limit": run_limit,
    "sdjax": run_sdjax,
    "longest": run_longest,
    "equal": lambda args: run_sdjax(args, equal=True),
    "transformers": run_transformers,
    "int8": run_int8,
}


def measure(args, ckpt: str) -> None:
    """Every engine on one checkpoint, each in a process of its own; then the summary.

    The limit is measured before and after the engine, and the faster one counts: machines drift.
    """
    lines = {}
    default = ["limit", "sdjax", "limit", "longest", "equal", "transformers"]
    for engine in args.engine or default:
        python = args.torch_python if engine == "transformers" else sys.executable
        if not python:
            continue
        given = [*sys.argv[1:], "--ckpt", ckpt, "--engine", engine, "--alone"]
        done = subprocess.run([python, __file__, *given], stdout=subprocess.PIPE, check=True)
        print(done.stdout.decode().strip(), flush=True)
        line = json.loads(done.stdout.decode().strip().splitlines()[-1])
        if engine not in lines or line["seconds"] < lines[engine]["seconds"]:
            lines[engine] = line
    if {"limit", "sdjax", "longest", "equal"} <= set(lines):
        print(json.dumps(summary(lines)), flush=True)


def main() -> None:
    here = sys.executable if importlib.util.find_spec("torch") else None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", default=["random"], help="folders, or random")
    parser.add_argument("--engine", choices=tuple(ENGINES), nargs="*")
    parser.add_argument("--torch-python", default=here, help="a Python with torch, transformers")
    parser.add_argument("--torch-batches", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--median", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--row-halvings", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        args.ckpt = args.ckpt[0]
        ENGINES[args.engine[0]](args)
        return
    with tempfile.TemporaryDirectory() as folder:
        for ckpt in args.ckpt:
            if ckpt == "random":
                ckpt = random_checkpoint(os.path.join(folder, "random"))
            measure(args, ckpt)


if __name__ == "__main__":
    main()
