"""docs/data.md: every source, style, kind and preset has its row, and the commands parse."""

import pathlib
import re

from ml_collections import ConfigDict

from sdjax import config
from sdjax.data.benchmarks import SOURCES
from sdjax.data.problems import GENERIC, SYNTHETIC_SPLITS
from sdjax.data.prompts import STYLES
from sdjax.teacher.context import KINDS
from sdjax.teacher.templates import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_everything_that_can_be_named_is_in_the_docs():
    named = set(re.findall(r"`([\w.]+)`", TEXT))
    families = {n for n in SOURCES if n.startswith(("task_coverage", "sciknoweval"))}
    for name in families:  # written as `task_coverage_1`, `_8`, ...
        assert name in named or "_" + name.rpartition("_")[2] in named, name
    for name in [*SOURCES.keys() - families, *GENERIC, *KINDS, *PRESETS, *STYLES]:
        assert name in named or name == "auto", name
    assert all(split in TEXT for split in SYNTHETIC_SPLITS)


def test_table_of_sources_says_what_the_code_does():
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in TEXT.splitlines() if "|" in line]
    for name, source in SOURCES.items():
        row = next(r for r in rows if f"`{name}`" in r[0] or _family(name, r[0]))
        assert row[2] == source.hub, name
        assert row[3] == ", ".join(source.splits), name
        assert row[4:6] == [source.style, source.reward], name


def _family(name, cell):
    stem, _, last = name.rpartition("_")
    return f"`{stem}_" in cell and f"`_{last}`" in cell


def test_fields_on_the_command_lines_exist():
    base = config.base()
    commands = re.findall(r"--config\.([\w.]+)=", TEXT) + re.findall(r"`config\.([\w.]+)", TEXT)
    assert len(commands) > 10
    for path in commands:
        value = config.field(base, path)
        assert not isinstance(value, ConfigDict) or path in ("data", "teacher.context")
    for file in re.findall(r"--config=(\S+)", TEXT):
        assert (ROOT / file).is_file(), file
