"""Every command of docs/launch.md is real: dry-run where it would rent something."""

import pathlib
import re
import shlex
import subprocess

import pytest

from sdjax.plan import chips

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
COMMANDS = [
    " ".join(block.replace("\\\n", " ").split())
    for block in re.findall(r"^    (launch/\S+\.sh (?:.*\\\n)*.*)$", TEXT, flags=re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_accepted(command):
    """A renamed flag or a missing argument would make the docs lie."""
    words = shlex.split(command.replace(" -- ", " --dry-run -- ", 1))
    if "--" not in words:
        words.append("--dry-run")
    words = [word.replace("BUCKET", "bucket").replace("CLUSTER", "cluster") for word in words]
    words = ["proj-1" if word == "P" else word for word in words]
    done = subprocess.run(["bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_all_scripts_are_named():
    """And there is nothing in launch/ that the docs do not mention."""
    assert len(COMMANDS) >= 6
    for path in (ROOT / "launch").glob("*.sh"):
        assert path.name in TEXT or path.name in ("lib.sh", "host.sh")


def test_the_slices_and_configs_of_the_pods_page_exist():
    """What docs/pods.md tells to plan must be a slice and a config that there are."""
    text = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    slices = re.findall(r"--config\.plan\.topolog(?:y|ies)=([\w:,]+)", text)
    assert slices
    for name in ",".join(slices).split(","):
        chips.parse(name)
    for path in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / path).is_file(), path
