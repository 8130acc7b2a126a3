"""Makes a notebook from its source: runs every cell in a clean kernel and saves the outputs.

python notebooks/build.py            (needs the extra `notebooks`; debug_step.py -> .ipynb)
"""

import os
import pathlib

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent


def execute(source: pathlib.Path, workdir: pathlib.Path, timeout_s: int = 300):
    """The executed notebook; raises nbclient's error with the traceback of a failing cell."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XLA_FLAGS": ""}
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(workdir)}},
    )
    return client.execute(env=env)


if __name__ == "__main__":
    for source in (FOLDER / "debug_step.py",):
        notebook = execute(source, FOLDER)
        for place, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{place}"  # not a random one, which would change every time
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"wrote {source.with_suffix('.ipynb')}")
