"""A plan as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping

from sdjax.plan.roofline import Phase
from sdjax.plan.study import GIB, Plan


def to_markdown(plan: Plan) -> str:
    """The report of one slice."""
    t, c, spec = plan.topology, plan.c, plan.spec
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"## {c.model.path} on {t.name} ({t.product}, {t.devices} devices, {plan.hosts} hosts)",
        "",
        _verdict(plan),
        "",
        f"- model: {plan.parameters / 1e9:.2f} B parameters, {c.model.compute_dtype} compute, "
        f"attention {plan.attention}, remat {c.model.remat}",
        f"- mesh: {mesh}; sampling on each host's own devices: "
        + " x ".join(f"{name} {size}" for name, size in plan.rollout_mesh.items() if size > 1),
        f"- optimizer step: {spec.micro_batches} x {spec.micro_rows} rows of {spec.row_len:,} "
        f"student and {spec.teacher_row_len:,} teacher tokens",
        "",
        "| GiB per device | training | sampling |",
        "|---|---|---|",
    ]
    kinds = list(dict.fromkeys([*plan.train_memory, *plan.rollout_memory]))
    for kind in kinds:
        cells = [memory.get(kind, 0) for memory in (plan.train_memory, plan.rollout_memory)]
        lines.append(f"| {kind} | " + " | ".join(_gib(n) if n else "" for n in cells) + " |")
    totals = (plan.train_bytes, plan.rollout_bytes)
    lines.append("| **total** | " + " | ".join(f"**{_gib(n)}**" for n in totals) + " |")
    lines += ["", *_slots(plan), *_times(plan), *_collectives(plan), *_provenance(plan)]
    return "\n".join(lines) + "\n"


def _verdict(plan: Plan) -> str:
    most = max(plan.train_bytes, plan.rollout_bytes)
    share = most / plan.topology.chip.hbm_bytes
    have = f"{plan.topology.chip.hbm_bytes / GIB:.2f} GiB"
    refused = [name for name, program in plan.programs.items() if not program.compiled]
    note = f" XLA refused: {', '.join(refused)}." if refused else ""
    if plan.fits:
        return f"**Fits**: {_gib(most)} GiB of {have} per device ({share:.0%})."
    over = (most - plan.limit) / GIB
    lines = [
        f"**Does not fit**: {_gib(most)} GiB of {have} per device ({share:.0%}), {over:.1f} GiB "
        f"over the limit of {plan.c.plan.limit_frac:.0%}.{note}"
    ]
    return "\n".join(lines + [f"- {suggestion}" for suggestion in plan.suggestions])


def _slots(plan: Plan) -> list[str]:
    if not plan.rollout_memory:
        return []
    return [
        f"Decode slots per host: {plan.slots} set (`rollout.slots`), {plan.slots_that_fit} fit at "
        "the greatest length.",
        "",
    ]


def _times(plan: Plan) -> list[str]:
    """The phases at the roofline."""
    lines = [
        "| phase | TFLOP | GB moved | GB sent | s at the roofline | bound by | per batch | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in plan.phases:
        lines.append(
            f"| {p.name} | {p.flops / 1e12:.4g} | {p.bytes / 1e9:.4g} | {p.wire / 1e9:.3g} | "
            f"{p.seconds:.4g} | {p.bound} | x {p.times:.4g} | {p.total_seconds:.4g} |"
        )
    mean = plan.c.plan.response_len or plan.c.sampling.max_new_tokens / 2
    lines += [
        f"| **training batch** | | | | | | | **{plan.batch_seconds:.4g}** |",
        "",
        f"Per device, with responses of {mean:,.0f} tokens on average. A floor, not a forecast.",
        "",
    ]
    step = next((p for p in plan.phases if p.name == "train step"), None)
    if step is not None:
        share = plan.analytic_train_flops and _full(plan, step).flops / plan.analytic_train_flops
        lines += [f"FLOPs of the compiled step / by formula: {share:.3f}.", ""]
    return lines


def _full(plan: Plan, step: Phase) -> Phase:
    """The step with all its micro-batches full, as the formula counts it."""
    c = plan.c
    mean = c.plan.response_len or c.sampling.max_new_tokens / 2
    share = (c.data.max_prompt_len + mean) / (c.data.max_prompt_len + c.sampling.max_new_tokens)
    return dataclasses.replace(step, flops=step.flops / min(1.0, share))


def _collectives(plan: Plan) -> list[str]:
    """What each phase sends, by kind."""
    lines = ["| phase | collective | times | GB sent per device |", "|---|---|---|---|"]
    for p in plan.phases:
        for kind, (count, sent) in sorted(p.collectives.items()):
            lines.append(f"| {p.name} | {kind} | {count:,.0f} | {sent / 1e9:.4g} |")
    return [*lines, ""] if len(lines) > 2 else []


def _provenance(plan: Plan) -> list[str]:
    versions = ", ".join(f"{p} {_version(p)}" for p in ("jax", "libtpu"))
    seconds = ", ".join(f"{n} {p.compile_s:.0f} s" for n, p in plan.programs.items())
    return [f"Compiled with {versions} ({seconds})."]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _gib(n: int) -> str:
    return f"{n / GIB:.2f}"


def to_dict(plan: Plan) -> dict:
    """The plan as plain values: bytes, FLOPs and seconds per device."""
    phases = [
        {
            "name": p.name,
            "times": p.times,
            "flops": p.flops,
            "bytes": p.bytes,
            "wire_bytes": p.wire,
            "collectives": {k: {"times": n, "bytes": b} for k, (n, b) in p.collectives.items()},
            "seconds": p.seconds,
            "clocks": p.clocks,
            "bound": p.bound,
        }
        for p in plan.phases
    ]
    return {
        "model": plan.c.model.path,
        "topology": plan.topology.name,
        "product": plan.topology.product,
        "devices": plan.topology.devices,
        "hosts": plan.hosts,
        "mesh": plan.mesh,
        "rollout_mesh": plan.rollout_mesh,
        "parameters": plan.parameters,
        "packing": dataclasses.asdict(plan.spec),
        "hbm_bytes": plan.topology.chip.hbm_bytes,
        "limit_bytes": plan.limit,
        "fits": plan.fits,
        "train_memory": plan.train_memory,
        "rollout_memory": plan.rollout_memory,
        "train_bytes": plan.train_bytes,
        "rollout_bytes": plan.rollout_bytes,
        "slots": plan.slots,
        "slots_that_fit": plan.slots_that_fit,
        "phases": phases,
        "batch_seconds": plan.batch_seconds,
        "analytic_train_flops": plan.analytic_train_flops,
        "suggestions": plan.suggestions,
        "compile_s": {name: program.compile_s for name, program in plan.programs.items()},
        "config": json.loads(plan.c.to_json_best_effort()),
    }


def to_json(plan: Plan) -> str:
    """The same as text."""
    return json.dumps(to_dict(plan), indent=1)


def comparison(plans: list[Plan], refused: Mapping[str, str] | None = None) -> str:
    """One line per slice; below, why some could not be planned for."""
    lines = [
        "| slice | product | mesh | fits | training GiB | sampling GiB | of | slots | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        mesh = " x ".join(map(str, p.mesh.values()))
        lines.append(
            f"| {p.topology.name} | {p.topology.product} | {mesh} | {'yes' if p.fits else 'no'} | "
            f"{_gib(p.train_bytes)} | {_gib(p.rollout_bytes)} | "
            f"{p.topology.chip.hbm_bytes / GIB:.2f} | {p.slots_that_fit} | {p.batch_seconds:.4g} |"
        )
    lines += ["", *(f"{name}: {why}" for name, why in refused.items())] if refused else []
    return "\n".join(lines) + "\n"
