"""The verifier beside math-verify in one run: throughput on long responses, accuracy, bombs.

    python benchmarks/verifier.py throughput
    python benchmarks/verifier.py accuracy --cases ../shared/verifier/cases_public.jsonl
    python benchmarks/verifier.py hostile --cases ../shared/verifier/hostile_public.jsonl

Prints one JSON line per engine. math-verify is called as its users call it, `verify(parse(gold),
parse(response))`; for accuracy and bombs it gets the last box only, which flatters it, and runs in
our pool (a user's reward by dotted path) so that what hangs can be killed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sdjax.rewards import Verdict, VerifierPool  # noqa: E402
from sdjax.rewards.extract import last_box  # noqa: E402

PROSE = (
    "Wait, let me check this again. We try $x^2+1=0$ and $\\frac{1}{2}$, so that $y=3$ follows. "
    "Since the triangle is isosceles, both angles are equal, and the sum is what we wanted. "
)
BOMBS = ("9^{9^{9^{9}}}", "99999999!", "\\sum_{k=1}^{10^{12}} \\frac{1}{k}", "(" * 150 + ")" * 150)


def math_verify_reward(response: str, gold: str) -> Verdict:
    """math-verify on the last box, without its alarms: the pool holds the deadline."""
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    answer = last_box(response or "")[0]
    if answer is None or not gold.strip():
        return Verdict(False, None, "no_box")
    sides = [math_verify.parse(f"\\boxed{{{t}}}", parsing_timeout=None) for t in (gold, answer)]
    return Verdict(bool(math_verify.verify(*sides, timeout_seconds=None)), answer, "math_verify")


def typical_batch(count: int, chars: int, group: int = 8, seed: int = 0):
    """(responses, golds): groups of 8; 60 % integer golds; right, wrong, unboxed, a few bombs."""
    rng = random.Random(seed)
    own = [
        line[2:].split(" | ")
        for line in (ROOT / "tests/rewards/own_cases.txt").read_text().splitlines()
        if line[:2] == "+ "
    ]
    responses, golds = [], []
    while len(responses) < count:
        integer = rng.random() < 0.6
        gold = str(rng.randint(0, 999)) if integer else rng.choice(own)[0]
        variants = [gold, *(answer for g, answer in own if g == gold)]
        for _ in range(group):
            kind = rng.random()
            if kind < 0.5:
                answer = rng.choice(variants)
            elif kind < 0.9:
                answer = str(rng.randint(0, 999)) if integer else rng.choice(own)[1]
            else:
                answer = rng.choice(BOMBS) if kind > 0.995 else None
            filler = PROSE * (chars // len(PROSE)) + f"So {rng.randint(0, 10**6)}. "
            end = "" if answer is None else f"The answer is $\\boxed{{{answer}}}$."
            responses.append(filler + end)
            golds.append(gold)
    return responses[:count], golds[:count]


def throughput(args) -> None:
    """Seconds for a batch of long responses; math-verify on a sample of it, scaled."""
    responses, golds = typical_batch(args.responses, args.chars)
    common = {"responses": args.responses, "chars": args.chars, "cores": os.cpu_count()}
    with VerifierPool(workers=args.workers) as pool:
        pool.score(["\\boxed{x}"], ["y"])  # a worker that is up: start-up happens once per run
        start, cpu = time.perf_counter(), time.process_time()
        verdicts = pool.score(responses, golds)
        seconds = time.perf_counter() - start
        stats = pool.stats()
    report(
        engine="sdjax",
        workers=args.workers,
        seconds=seconds,
        per_second=len(responses) / seconds,
        trainer_cpu_s=time.process_time() - cpu,
        correct=sum(v.correct for v in verdicts),
        stats={k: n for k, n in stats.items() if "/" not in k},
        **common,
    )
    sample = range(0, len(responses), max(1, len(responses) // args.sample))
    start = time.perf_counter()
    correct = sum(_math_verify_whole(responses[k], golds[k]) for k in sample)
    each = (time.perf_counter() - start) / len(sample)
    report(
        engine="math-verify",
        workers=1,
        sample=len(sample),
        seconds=each * len(responses),
        per_second=1 / each,
        correct_of_sample=correct,
        **common,
    )
    report(speedup=each * len(responses) / seconds)


def _math_verify_whole(response: str, gold: str) -> bool:
    """`parse` + `verify` as in a user's loop, with its alarms (the main thread has them)."""
    import logging

    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        return bool(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response)))
    except Exception:
        return False


def load(path: str) -> list[dict]:
    """Scored rows of a case file."""
    rows = [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]
    for row in rows:
        if "response" not in row:
            parts = row["response_parts"]
            row["response"] = "".join(p if isinstance(p, str) else p[0] * p[1] for p in parts)
    return [row for row in rows if row["scored"]]


def accuracy(args) -> None:
    """Right and wrong verdicts and the time of each, per engine."""
    rows = load(args.cases)
    for engine, reward in (
        ("sdjax", "math"),
        ("math-verify", "benchmarks.verifier:math_verify_reward"),
    ):
        os.environ["PYTHONPATH"] = str(ROOT)
        with VerifierPool(workers=1, reward=reward, deadline_s=args.deadline) as pool:
            pool.score(["\\boxed{x}"], ["y"])
            verdicts, times = [], []
            for row in rows:
                start = time.perf_counter()
                verdicts.append(pool.submit(row["response"], row["gold"]).result())
                times.append(1000 * (time.perf_counter() - start))
            stats = pool.stats()
        pairs = list(zip(rows, verdicts, strict=True))
        false_positive = sum(v.correct and not row["expected"] for row, v in pairs)
        false_negative = sum(row["expected"] and not v.correct for row, v in pairs)
        cut = statistics.quantiles(times, n=100)
        report(
            engine=engine,
            cases=pathlib.Path(args.cases).name,
            scored=len(rows),
            accuracy=1 - (false_positive + false_negative) / len(rows),
            false_positives=false_positive,
            false_negatives=false_negative,
            p50_ms=cut[49],
            p99_ms=cut[98],
            slowest_ms=max(times),
            over_2_s=sum(t > 2000 for t in times),
            killed=stats.get("timeout", 0) + stats.get("crash", 0),
            largest_worker_mib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        )


def report(**values) -> None:
    """One JSON line, floats short."""
    print(
        json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["throughput", "accuracy", "hostile"])
    parser.add_argument("--cases", help="case file of accuracy and hostile")
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--chars", type=int, default=80_000, help="20k tokens")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sample", type=int, default=64, help="responses given to math-verify")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds per answer")
    args = parser.parse_args()
    if args.what == "throughput":
        throughput(args)
    elif args.cases is None:
        parser.error("--cases=FILE is needed for accuracy and hostile")
    else:
        accuracy(args)


if __name__ == "__main__":
    main()
