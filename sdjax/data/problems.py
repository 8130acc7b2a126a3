"""Problems by the name of their source: loads, checks every row, removes duplicates and long ones.

`load_problems(config.data)` is what the training loop calls, `load_set(name, config.data)` what an
evaluation calls; `load_report` also tells what was left out and why. A bad row is reported with its
index and skipped, or refuses the whole source (config.data.on_bad_row). Never imports jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Hashable, Iterable

from sdjax.data import benchmarks, sources
from sdjax.data.benchmarks import SOURCES, Source
from sdjax.data.columns import BadRow, Columns, RowError, read_row
from sdjax.data.overlap import normal_text
from sdjax.data.prompts import STYLES, problem_messages
from sdjax.data.sampler import ProblemSampler
from sdjax.records import Problem

__all__ = [
    "DataConfig",
    "LoadReport",
    "ProblemSampler",
    "known_names",
    "load_problems",
    "load_report",
    "load_set",
]

GENERIC = ("jsonl", "parquet", "hub")  # any file, any hub data set, by column mapping
SYNTHETIC_SPLITS = ("test", "ood_steps", "ood_large", "ood_family")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The fields of config.data that loading reads, explained there."""

    name: str = "synthetic"
    path: str = ""
    hub: str = ""
    hub_config: str = ""
    split: str = ""
    columns: Columns = dataclasses.field(default_factory=Columns)
    prompt_style: str = "auto"
    dedupe: bool = True
    on_bad_row: str = "skip"
    limit: int | None = None
    synthetic_size: int = 4096
    synthetic_level: int | None = None
    max_prompt_len: int = 2048
    on_long_prompt: str = "drop"
    enable_thinking: bool | None = None
    system: str | None = None
    chat_template: str | None = None

    @classmethod
    def from_config(cls, c) -> DataConfig:
        """From the whole config or from its section `data`."""
        section = c.data if "data" in c else c
        values = {f.name: section[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**values, "columns": Columns(**section.columns)})


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a source gave: its problems, the rows that are none, and counts of what was removed."""

    problems: list[Problem]
    rows: int
    bad_rows: list[BadRow]
    duplicates: int
    too_long: int
    origin: str

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.problems)} problems from {self.origin}: {self.rows} rows, "
            f"{len(self.bad_rows)} bad, {self.duplicates} duplicates, {self.too_long} too long"
        )


def known_names() -> list[str]:
    """Every value that config.data.name may have."""
    return ["synthetic", *GENERIC, *sorted(SOURCES)]


def load_problems(data_config, tokenizer=None) -> list[Problem]:
    """The problems of config.data (a section of the config or a DataConfig), in the file's order.

    With a tokenizer, prompts over max_prompt_len are left out (on_long_prompt="drop"). Logs counts.
    Raises ValueError or FileNotFoundError in one sentence where there is nothing to read.
    """
    report = load_report(data_config, tokenizer)
    log.info("%s", report.summary())
    for bad in report.bad_rows[:10]:
        log.warning("row %d of %s skipped: %s", bad.index, report.origin, bad.reason)
    if len(report.bad_rows) > 10:
        log.warning("... and %d more bad rows", len(report.bad_rows) - 10)
    return report.problems


def load_set(name: str, data_config, limit: int | None = None) -> list[Problem]:
    """An evaluation set by name: a split of the synthetic tasks, or the test split of a source.

    Of `data_config` only a `path` that is a folder is used: the root of local copies.
    """
    cfg = _as_config(data_config)
    if name in SYNTHETIC_SPLITS:
        changed = {"name": "synthetic", "split": name, "synthetic_level": None}
        size = {"synthetic_size": limit or cfg.synthetic_size}
        return load_problems(dataclasses.replace(cfg, **changed, **size))
    splits = _source(name).splits
    path = cfg.path if cfg.path and not _is_file(cfg.path) else ""
    changed = {"name": name, "path": path, "hub": "", "split": splits[-1]}
    cfg = dataclasses.replace(cfg, **changed, columns=Columns(), prompt_style="auto", limit=limit)
    return load_problems(cfg)


def load_report(data_config, tokenizer=None) -> LoadReport:
    """As `load_problems`, with the account of what was left out."""
    cfg = _as_config(data_config)
    if cfg.prompt_style not in STYLES:
        raise ValueError(
            f"config.data.prompt_style is {cfg.prompt_style!r}, but must be one of "
            f"{', '.join(STYLES)}"
        )
    if cfg.name == "synthetic":
        return _synthetic(cfg)
    source = _source(cfg.name)
    split = cfg.split or source.splits[0]
    if source.splits and split not in source.splits and cfg.name not in GENERIC:
        raise ValueError(
            f"config.data.split is {split!r}, but {cfg.name} has {', '.join(source.splits)}"
        )
    rows, origin = _rows(cfg, source, split)
    count, duplicates, problems, bad = _read(rows, cfg, source)
    if bad and cfg.on_bad_row == "refuse":
        raise ValueError(
            f"row {bad[0].index} of {origin} (and {len(bad) - 1} more) cannot be used: "
            f"{bad[0].reason}; mend it, or set config.data.on_bad_row=skip"
        )
    short = [p for p in problems if _fits(p, cfg, tokenizer)]
    if not short:
        why = f"; row {bad[0].index}: {bad[0].reason}" if bad else ""
        raise ValueError(f"{origin} gives no usable problem out of {count} rows{why}")
    return LoadReport(
        problems=short[: cfg.limit],
        rows=count,
        bad_rows=bad,
        duplicates=duplicates,
        too_long=len(problems) - len(short),
        origin=origin,
    )


def _as_config(data_config) -> DataConfig:
    if isinstance(data_config, DataConfig):
        return data_config
    return DataConfig.from_config(data_config)


def _source(name: str) -> Source:
    if name in GENERIC:
        return Source(files=(), splits=("train",), style="as_is")
    if name not in SOURCES:
        near = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"data source {name!r} (config.data.name or config.eval.sets) is unknown: {hint}"
            f"known are {', '.join(known_names())}"
        )
    return SOURCES[name]


def _synthetic(cfg: DataConfig) -> LoadReport:
    from sdjax.data import synthetic

    split = cfg.split or "train"
    problems = synthetic.make_problems(split, cfg.synthetic_size, level=cfg.synthetic_level)
    problems = problems[: cfg.limit]
    return LoadReport(problems, len(problems), [], 0, 0, f"synthetic/{split}")


def _rows(cfg: DataConfig, source: Source, split: str) -> tuple[Iterable[tuple[int, dict]], str]:
    """Rows with their index in the source, and the name of where they came from."""
    files = tuple(file.format(split=split) for file in source.files)
    local = None if cfg.name == "hub" else sources.find_local(cfg.path, files)
    if local is not None:
        rows = sources.read_rows(local, split)
        whole = source.split_10 and not local.endswith(f"{split}.json")
        return benchmarks.split_rows(list(rows), split) if whole else enumerate(rows), local
    hub = cfg.hub or source.hub
    if not hub and cfg.name == "hub":
        raise ValueError("config.data.name=hub needs the data set's name in config.data.hub")
    if not hub:
        raise ValueError(
            f"config.data.name={cfg.name} is read from a local file and none was found. "
            + sources.local_hint("the data", files)
        )
    hub_split = split
    if source.hub_splits and not cfg.hub:
        hub_split = source.hub_splits[source.splits.index(split)]
    rows = sources.read_hub(
        hub, cfg.hub_config or source.hub_config, hub_split, source.hub_files, files
    )
    return enumerate(rows), f"hub data set {hub}"


def _read(
    rows: Iterable[tuple[int, dict]], cfg: DataConfig, source: Source
) -> tuple[int, int, list[Problem], list[BadRow]]:
    """Count of rows, count of duplicates, problems, bad rows; copies are dropped as they come."""
    style = source.style if cfg.prompt_style == "auto" else cfg.prompt_style
    read = read_row if cfg.columns != Columns() else source.read
    count = duplicates = 0
    problems, bad, seen, seen_raw = [], [], set(), set()
    for index, row in rows:
        count += 1
        raw = _raw_prompt(row, cfg.columns) if source.distinct == "prompt" else None
        if cfg.dedupe and raw is not None and raw in seen_raw:
            duplicates += 1
            continue
        try:
            problem = read(row, index, cfg.columns, style)
        except RowError as error:
            bad.append(BadRow(index, str(error)))
            continue
        key = problem.id if source.distinct == "id" else normal_text(problem.prompt)
        if cfg.dedupe and key in seen:
            duplicates += 1
            continue
        seen.add(key)
        seen_raw.add(raw)
        problems.append(problem)
    return count, duplicates, problems, bad


def _raw_prompt(row: dict, columns: Columns) -> Hashable:
    """The prompt column as it stands, hashable: spares a literal copy of a row all further work."""
    value = row.get(columns.prompt or "prompt")
    if isinstance(value, list):
        return tuple(m.get("content") if isinstance(m, dict) else str(m) for m in value)
    return value if isinstance(value, str) else None


def _fits(problem: Problem, cfg: DataConfig, tokenizer) -> bool:
    """Whether the student's rendered prompt is within the limit (true without a tokenizer)."""
    if tokenizer is None or cfg.on_long_prompt != "drop":
        return True
    from sdjax.data import chat

    tokens = chat.encode_prompt(
        tokenizer,
        problem_messages(problem),
        enable_thinking=cfg.enable_thinking,
        system=cfg.system,
        chat_template=cfg.chat_template,
    )
    return len(tokens) <= cfg.max_prompt_len


def _is_file(path: str) -> bool:
    return "://" in path or path.endswith(sources.SUFFIXES)
