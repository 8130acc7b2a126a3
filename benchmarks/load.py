"""Time and memory to load a checkpoint, beside transformers on PyTorch; compile time against depth.

    python benchmarks/load.py --ckpt SMOLLM2_DIR [--reps 3]      # prints one JSON line per engine

Each engine runs in a process of its own, so that peak memory is its own: first the imports, then
`reps` loads with every weight touched. The files are in the page cache. `baseline_mb` is the
resident memory before the first load, `peak_mb` the highest after it; `seconds` is the median of
the loads after the first.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

ENGINES = ("sdjax", "transformers", "compile")


def rss_mb() -> float:
    """Resident memory of this process now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def load_sdjax(path):
    import jax

    from sdjax.models import hf

    _, params = hf.load(path)
    return sum(float(np.asarray(x).ravel()[::1024].sum()) for x in jax.tree.leaves(params))


def load_transformers(path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return sum(float(p.flatten()[::1024].sum()) for p in model.parameters())


def time_loads(engine, path, reps):
    """One JSON line: wall and CPU seconds, and memory, of loading `path`."""
    if engine == "sdjax":
        import jax

        import sdjax.models.hf  # noqa: F401  imports are not what is measured

        jax.devices()
        load = load_sdjax
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        load = load_transformers
    baseline, walls, cpus = rss_mb(), [], []
    for _ in range(reps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        checksum = load(path)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if len(walls) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(f.stat().st_size for f in pathlib.Path(path).glob("*.safetensors"))
    return {
        "engine": engine,
        "seconds": round(statistics.median(walls[1:]), 3),
        "seconds_min": round(min(walls[1:]), 3),
        "cpu_seconds": round(statistics.median(cpus[1:]), 3),
        "first_seconds": round(walls[0], 3),
        "baseline_mb": round(baseline),
        "peak_mb": round(peak),
        "checkpoint_mb": round(size / 2**20),
        "checksum": checksum,
    }


def time_compile():
    """One JSON line: seconds to trace and compile the forward pass of 4 and of 32 layers."""
    import jax
    import jax.numpy as jnp

    from sdjax.models import decoder
    from sdjax.models.config import ModelConfig

    def compile_seconds(layers):
        cfg = ModelConfig("qwen3", 512, 64, layers, 4, 2, 16, 128, qk_norm="head")
        specs = decoder.param_specs(cfg)
        params = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs, is_leaf=decoder.is_spec
        )
        rows = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        start = time.process_time()
        forward = jax.jit(decoder.hidden_states, static_argnums=4)
        forward.lower(params, rows, rows, rows, cfg).compile()
        return time.process_time() - start

    compile_seconds(2)  # the first compilation pays for start-up
    seconds = {layers: round(compile_seconds(layers), 3) for layers in (4, 32)}
    return {"engine": "compile", "cpu_seconds_by_layers": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="only this one, in this process")
    args = parser.parse_args()
    if args.engine == "compile":
        print(json.dumps(time_compile()), flush=True)
    elif args.engine:
        print(json.dumps(time_loads(args.engine, args.ckpt, args.reps)), flush=True)
    else:
        for engine in ENGINES:
            command = [sys.executable, __file__, "--ckpt", args.ckpt, "--reps", str(args.reps)]
            subprocess.run([*command, "--engine", engine], check=True)


if __name__ == "__main__":
    main()
