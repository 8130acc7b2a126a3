"""The notebook runs from a clean kernel and is what its source says."""

import importlib.util
import pathlib

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"


def load_build():
    spec = importlib.util.spec_from_file_location("notebook_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_the_notebook_is_made_from_its_source_and_has_outputs():
    """Catches an edit of one of the two files, and outputs that were cleared."""
    source = jupytext.read(FOLDER / "debug_step.py")
    notebook = nbformat.read(FOLDER / "debug_step.ipynb", as_version=4)
    assert cells(notebook) == cells(source)
    assert any("text/html" in output.get("data", {}) for output in outputs(notebook))
    assert not any(output.output_type == "error" for output in outputs(notebook))


def test_the_notebook_runs_from_a_clean_kernel(tmp_path):
    """Ends with its own comparison of the gradient by hand with the compiled step."""
    notebook = load_build().execute(FOLDER / "debug_step.py", tmp_path, timeout_s=300)
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    assert "by hand:" in printed and "compiled:" in printed
