"""Eight fake CPU devices for every test, and the folder of reference cases where there is one."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        + " --xla_backend_optimization_level=0"  # tests mostly compile: half the time
    )
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))


@pytest.fixture(scope="session")
def shared_dir():
    """Folder of reference cases (SDJAX_SHARED, or shared/ beside the checkout), else skips."""
    path = pathlib.Path(os.environ.get("SDJAX_SHARED", ROOT.parent / "shared"))
    if not (path / "fixtures" / "manifest.json").exists():
        pytest.skip(f"reference cases not found at {path}: set SDJAX_SHARED to their folder")
    return path
