"""Imports point downward only, and the host side never imports jax (docs/design.md)."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "sdjax"

LAYERS = {
    "types": 0,
    "records": 0,
    "objectives": 1,
    "compiled": 1,
    "parallel": 1,
    "data": 1,
    "rewards": 1,
    "teacher": 1,
    "config": 1,
    "eval_config": 1,
    "paper": 1,
    "validation": 1,
    "optimizer": 1,
    "models": 2,
    "head": 2,
    "measure": 2,
    "step": 3,
    "rollout": 3,
    "checkpoint": 3,
    "distributed": 3,
    "metrics": 4,
    "progress": 4,
    "analysis": 4,
    "collect": 4,
    "build": 4,
    "evaluate": 4,
    "sft": 4,
    "train": 4,
    "plan": 4,
    "profiling": 4,
    "doctor": 4,
    "main": 5,
}
WITHOUT_JAX = (
    "sdjax.records",
    "sdjax.config",
    "sdjax.eval_config",
    "sdjax.paper",
    "sdjax.validation",
    "sdjax.rewards",
    "sdjax.data",
    "sdjax.teacher",
)


def _room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: pathlib.Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdjax"):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            rooms.update(names)
        elif isinstance(node, ast.Import):
            rooms.update(a.name.split(".")[1] for a in node.names if a.name.startswith("sdjax."))
    return rooms


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    """A room may import its own layer and those below; an unknown room must be given a layer."""
    here = _room(path)
    assert here in LAYERS, f"give {here} a layer in this test"
    for room in _imported_rooms(path) - {"__version__"}:
        assert LAYERS[room] <= LAYERS[here], f"{path.name} ({here}) must not import {room}"


def test_host_side_does_not_import_jax():
    """Verifier workers and data checks start without jax: it costs a second and grabs the chip."""
    names = [
        ".".join(("sdjax", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for p in MODULES
    ]
    host = [n for n in names if n.startswith(WITHOUT_JAX)]
    code = f"import sys\nfor n in {host!r}: __import__(n)\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
