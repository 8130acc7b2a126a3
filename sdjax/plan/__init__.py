"""mode=plan: compiles the real run for a TPU slice not yet rented, and says whether it fits.

    python -m sdjax.main --config=configs/sdpo_qwen.py --config.mode=plan \
        --config.plan.topology=v5p:4x4x4

Needs libtpu (the `tpu` extra) and no accelerator. Prints a report and writes it to
<workdir>/plan/<slice>.md and .json. Compiles the largest shapes, so "fits" holds for the whole run.
`--config.plan.topologies=a,b,c` compares slices; where the config's mesh needs more devices than
one has, mesh.fsdp shrinks to what it has.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from sdjax import config
from sdjax.plan import chips, report, study


def run(c: ConfigDict, workdir: str) -> None:
    """Plans for config.plan.topology, or compares config.plan.topologies.

    Raises ValueError when the run does not split over the slice; of several, over none.
    """
    c.unlock()
    c.mode = "train"  # whose arithmetic the check should do
    config.check(c)
    names = c.plan.topologies.split(",") if c.plan.topologies else [c.plan.topology]
    topologies = [chips.parse(name) for name in names]
    folder = Path(workdir) / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[study.Plan] = []
    refused: dict[str, ValueError] = {}
    for topology in topologies:
        print(f"compiling for {topology.name} ({topology.product}) ...", flush=True)
        try:
            plan = study.study(c if len(topologies) == 1 else study.shrunk(c, topology), topology)
        except ValueError as error:  # one slice of several that cannot be is a line of the table
            refused[topology.name] = error
            print(f"{topology.name}: {error}", flush=True)
            continue
        plans.append(plan)
        name = topology.name.replace(":", "-")
        (folder / f"{name}.json").write_text(report.to_json(plan), encoding="utf-8")
        text = report.to_markdown(plan)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
    if not plans:
        raise next(iter(refused.values()))
    if len(topologies) > 1:
        table = report.comparison(plans, {name: str(error) for name, error in refused.items()})
        (folder / "comparison.md").write_text(table, encoding="utf-8")
        print(table)
