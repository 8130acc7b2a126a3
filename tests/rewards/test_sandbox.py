"""The sandbox of programs: what they cannot do to the machine, with Landlock and without."""

import os
import pathlib
import subprocess
import sys

import pytest

from sdjax.rewards.sandbox import CHILD, call_function, run_program

WRITES = {
    "truncate": "import os; os.truncate({path!r}, 0)",
    "truncate by opening": "import os; os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
    "write": "open({path!r}, 'r+')",
    "mode": "import os; os.chmod({path!r}, 0o777)",
    "times": "import os; os.utime({path!r}, (0, 0))",
    "owner": "import os; os.chown({path!r}, 1, 1)",
    "remove": "import os; os.unlink({path!r})",
    "rename": "import os; os.rename({path!r}, {path!r} + '2')",
    "new file": "open({path!r} + '2', 'w')",
    "new folder": "import os; os.mkdir({path!r} + '2')",
    "link": "import os; os.symlink('/', {path!r} + '2')",
}
# the same locks on a kernel without Landlock, which the machine of the test may not be
WITHOUT_LANDLOCK = """
import importlib.util
spec = importlib.util.spec_from_file_location("child", {child!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
child.confine_files = lambda libc, folder: False
child.lock_in(".")
print(open({path!r}).read())
try:
    {program}
except OSError:
    print("refused")
"""


@pytest.fixture
def victim(tmp_path):
    """A file that belongs to somebody else."""
    path = tmp_path / "checkpoint"
    path.write_text("precious")
    return path


def untouched(path: pathlib.Path, before: os.stat_result) -> bool:
    """Content, attributes and neighbours are what they were."""
    now = path.stat()
    same = (now.st_mode, now.st_mtime, now.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )
    return same and path.read_text() == "precious" and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", WRITES)
def test_nothing_outside_can_be_changed(victim, name):
    """A truncated checkpoint is the worst that a sampled program could do to a run."""
    before = victim.stat()
    outcome = run_program(WRITES[name].format(path=str(victim)), "", 20.0, 512)
    assert outcome.error == "runtime_error" and "Error: [Errno" in outcome.output
    assert untouched(victim, before)


@pytest.mark.parametrize("name", WRITES)
def test_nothing_can_be_changed_without_landlock(victim, name):
    """An older kernel must not mean that programs write where they like."""
    before = victim.stat()
    program = WRITES[name].format(path=str(victim))
    code = WITHOUT_LANDLOCK.format(child=CHILD, path=str(victim), program=program)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["precious", "refused"], done.stderr
    assert untouched(victim, before)


def test_data_and_other_processes_cannot_be_read(victim):
    """Golds in a data file, tokens in the environment of the worker, its memory with the tests."""
    if landlock_version() < 3:
        pytest.skip("this kernel's Landlock is too old to confine reading")
    for path in (victim, f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem"):
        outcome = run_program(f"print(open({str(path)!r}, 'rb').read(8))", "", 20.0, 512)
        assert outcome.error == "runtime_error" and "PermissionError" in outcome.output, path


def test_own_folder_and_libraries_work():
    """What solutions do use: numpy, files of their own, a value from a call."""
    program = (
        "import numpy, os\nopen('a', 'w').write('b')\nprint(numpy.arange(3).sum(), os.listdir())"
    )
    outcome = run_program(program, "", 30.0, 1024)
    if landlock_version() >= 3:
        assert outcome.output.startswith("3 ") and "'a'" in outcome.output
    assert call_function("def f(a):\n    return a + 1", "f", [1], 20.0, 512).value == 2


def landlock_version() -> int:
    """Version of the kernel's Landlock, -1 where there is none."""
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
