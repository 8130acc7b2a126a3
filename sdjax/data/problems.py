"""Problems by the name of their source: loads, checks every row, removes duplicates and long ones.

`load_problems(config.data)` is what the training loop calls, `load_set(name, config.data)` what an
evaluation calls; `load_report` also tells what was left out and why. A bad row is reported with its
index and skipped, or refuses the whole source (config.data.on_bad_row). Never imports jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence

from sdjax.data import benchmarks, sources
from sdjax.data.benchmarks import SOURCES, Source
from sdjax.data.columns import BadRow, Columns, RowError, read_row
from sdjax.data.golds import check_golds, warn_about_golds
from sdjax.data.overlap import normal_text, screened
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
    "training_problems",
]

GENERIC = ("jsonl", "parquet", "hub")  # any file, any hub data set, by column mapping
SYNTHETIC_SPLITS = ("test", "ood_steps", "ood_large", "ood_family", "easy_test")
SHOWN = 10  # bad rows logged one by one
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


def load_problems(data_config, tokenizer=None, pool=None, reward: str = "math") -> list[Problem]:
    """The problems of config.data (a section of the config or a DataConfig), in the file's order.

    With a tokenizer, prompts over max_prompt_len are left out (on_long_prompt="drop"); with a
    VerifierPool, so are golds that fail (`sdjax.data.golds`). Logs counts and reasons.
    Raises ValueError or FileNotFoundError in one sentence where there is nothing to use.
    """
    report = load_report(data_config, tokenizer, pool, reward)
    log.info("%s", report.summary())
    for bad in report.bad_rows[:SHOWN]:
        log.warning("row %d of %s skipped: %s", bad.index, report.origin, bad.reason)
    if len(report.bad_rows) > SHOWN:
        log.warning("... and %d more bad rows", len(report.bad_rows) - SHOWN)
    return report.problems


def training_problems(
    c, tokenizer, pool, eval_sets: Mapping[str, Sequence[Problem]]
) -> list[Problem]:
    """The problems that a run of config `c` trains on: loaded, golds checked, overlap screened."""
    for name in (c.data.name, *c.eval.sets):
        usual = SOURCES[name].reward if name in SOURCES else c.reward.name
        if usual != c.reward.name:
            log.warning(
                "the answers of %s are written for config.reward.name=%s, but it is %s",
                name,
                usual,
                c.reward.name,
            )
    problems = load_problems(c.data, tokenizer, pool, c.reward.name)
    held_out = {name: found for name, found in eval_sets.items() if name != "train"}
    warn_about_golds(held_out, pool, c.reward.name)
    return screened(problems, held_out, c.data.overlap_ngram, c.data.on_overlap == "drop")


def load_set(name: str, c, limit: int | None = None) -> list[Problem]:
    """An evaluation set by name.

    "train" is what training sees, |D| included; "test", "ood_steps" ... are synthetic splits; a
    file's path is read with the columns of config.data; any other name is the last split of that
    source. `c` is the whole config (its `data` section will do for all but "train"); a folder in
    config.data.path is tried as the place of local copies.
    """
    cfg = _as_config(c)
    if name == "train":
        problems = load_problems(cfg)
        sampler = ProblemSampler(problems, 1, c.seed, c.data.subset_size)
        return sampler.problems[:limit]
    if name in SYNTHETIC_SPLITS:
        changed = {"name": "synthetic", "split": name, "synthetic_level": None}
        size = {"synthetic_size": limit or cfg.synthetic_size}
        return load_problems(dataclasses.replace(cfg, **changed, **size))
    if _is_file(name):
        return load_problems(dataclasses.replace(cfg, name="jsonl", path=name, limit=limit))
    source = _source(name)
    split = source.splits[-1]
    near = (
        cfg.path and not _is_file(cfg.path) and sources.candidate(cfg.path, _files(source, split))
    )
    changed = {"name": name, "path": near or "", "hub": "", "split": split}
    cfg = dataclasses.replace(cfg, **changed, columns=Columns(), prompt_style="auto", limit=limit)
    return load_problems(cfg)


def load_report(data_config, tokenizer=None, pool=None, reward: str = "math") -> LoadReport:
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
    if split not in source.splits and cfg.name not in GENERIC:
        raise ValueError(
            f"config.data.split is {split!r}, but {cfg.name} has {', '.join(source.splits)}"
        )
    rows, origin = _rows(cfg, source, split)
    count, duplicates, problems, bad = _read(rows, cfg, source)
    short = [p for p in problems if _fits(p, cfg, tokenizer)]
    kept, bad_golds = _with_good_golds(short[: cfg.limit], pool, reward)
    bad = sorted([*bad, *bad_golds], key=lambda row: row.index)
    if bad and cfg.on_bad_row == "refuse":
        raise ValueError(
            f"row {bad[0].index} of {origin} (and {len(bad) - 1} more) cannot be used: "
            f"{bad[0].reason}; mend it, or set config.data.on_bad_row=skip"
        )
    if not kept:
        why = f"; row {bad[0].index}: {bad[0].reason}" if bad else ""
        raise ValueError(f"{origin} gives no usable problem out of {count} rows{why}")
    too_long = len(problems) - len(short)
    return LoadReport(kept, count, bad, duplicates, too_long, origin)


def _with_good_golds(
    problems: list[Problem], pool, reward: str
) -> tuple[list[Problem], list[BadRow]]:
    """Problems whose gold passes, and the others as bad rows."""
    if pool is None:
        return problems, []
    checks = check_golds(problems, pool, reward)
    bad = [
        BadRow(c.problem.meta["row"], f"the gold {c.problem.answer[:60]!r} fails: {c.kind}")
        for c in checks
        if not c.passed
    ]
    return [c.problem for c in checks if c.passed], bad


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
    files = _files(source, split)
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


def _files(source: Source, split: str) -> tuple[str, ...]:
    return tuple(file.format(split=split) for file in source.files)


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


def _raw_prompt(row: dict, columns: Columns) -> str | None:
    """The prompt column as it stands, as text: spares a literal copy of a row all further work."""
    value = row.get(columns.prompt or "prompt")
    if isinstance(value, list):
        return json.dumps(value, default=str)
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
