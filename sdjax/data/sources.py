"""Where rows come from: local JSONL, JSON and parquet files, folders of them, and the hub.

Local files are read directly; hub data sets and folders written by `save_to_disk` go through
`datasets`. Every failure says how to point to a local copy, since many machines have no network.
Does not interpret rows (`sdjax.data.columns`, `sdjax.data.benchmarks`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

DATA_ROOT = "SDJAX_DATA"  # environment variable: the folder that holds local copies
SUFFIXES = (".parquet", ".jsonl", ".json")

Row = dict[str, Any]


def data_root() -> Path | None:
    """The folder of local copies, None where SDJAX_DATA is not set."""
    value = os.environ.get(DATA_ROOT)
    return Path(value) if value else None


def find_local(path: str, candidates: Sequence[str] = ()) -> str | None:
    """The file or folder to read: `path` itself, or the first candidate below it or SDJAX_DATA.

    `path` may be a file, a folder to read whole (when none of the candidates stands in it), or a
    remote address (gs://, s3://, https://). None when nothing local was named or found. Raises
    FileNotFoundError when `path` was given and does not exist.
    """
    if "://" in path:
        return path
    if path and not Path(path).exists():
        raise FileNotFoundError(
            f"config.data.path={path} does not exist: name a file or a folder of "
            f"{', '.join(SUFFIXES)} files"
        )
    if path and Path(path).is_file():
        return path
    root = path or data_root()
    return (candidate(root, candidates) if root else None) or path or None


def candidate(root: str | Path, candidates: Sequence[str]) -> str | None:
    """The first of the candidate files that exists below `root`, None without one."""
    for name in candidates:
        for place in (Path(root) / name, Path(root) / Path(name).name):
            if place.exists():
                return str(place)
    return None


def read_rows(path: str, split: str = "") -> Iterator[Row]:
    """The rows of a file, or of all the files of a folder in the order of their names.

    In a folder that holds files named after splits (train.json, test-00000.parquet) only those of
    `split` are read. Raises ValueError with the line number for broken JSON.
    """
    if "://" in path or Path(path).is_file():
        yield from _read_file(path)
        return
    folder = Path(path)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _read_saved(folder, split)
        return
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    named = [p for p in files if split and p.name.startswith(split)]
    if not files:
        raise ValueError(f"config.data.path={path} holds no {', '.join(SUFFIXES)} file")
    for file in named or files:
        yield from _read_file(str(file))


def read_hub(
    hub: str,
    config: str = "",
    split: str = "train",
    raw_file: str = "",
    candidates: Sequence[str] = (),
) -> Iterable[Row]:
    """The rows of a hub data set, through `datasets`; `raw_file` picks one JSONL file of it.

    Raises ValueError with the way to a local copy (at `candidates`) when it cannot be had.
    """
    import datasets

    try:
        if raw_file:
            loaded = datasets.load_dataset(
                "json", data_files=f"hf://datasets/{hub}/{raw_file}", split="train"
            )
        else:
            loaded = datasets.load_dataset(hub, config or None, split=split)
    except Exception as error:  # datasets and the hub client raise a dozen unrelated types
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"data set {hub!r} (split {split!r}) could not be loaded from the hub: "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}. "
            + local_hint(hub, candidates)
        ) from error
    return loaded


def local_hint(name: str, candidates: Sequence[str] = ()) -> str:
    """The sentence that tells how to use a local copy of a data set."""
    places = f", or put it at $SDJAX_DATA/{candidates[0]}" if candidates else ""
    return (
        f"Without a network, point config.data.path to a local copy of {name} (a "
        f"{', '.join(SUFFIXES)} file, a folder of them, or one written by save_to_disk of datasets)"
        f"{places}."
    )


def _read_file(path: str) -> Iterator[Row]:
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    if not path.endswith(SUFFIXES):
        raise ValueError(
            f"config.data.path={path} has an unknown ending: supported are {', '.join(SUFFIXES)}"
        )
    with fsspec.open(path, "rt", encoding="utf-8-sig") as file:  # a byte order mark is no JSON
        text = file.read()
    if text.lstrip()[:1] == "[":
        rows = _parse(text, path, 1)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = (_parse(line, path, number) for number, line in lines if line.strip())
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: row {index} is a {type(row).__name__}, but every row must be an object"
            )
        yield row


def _read_parquet(path: str) -> Iterator[Row]:
    """In batches: DAPO-Math's file has 1.8 million rows, a hundred copies of each question."""
    import pyarrow.parquet as parquet

    with fsspec.open(path, "rb") as file:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=4096):
            yield from batch.to_pylist()


def _parse(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: broken JSON ({error})") from error


def _read_saved(folder: Path, split: str) -> Iterable[Row]:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"{folder} has the splits {', '.join(loaded)}, but config.data.split is {split!r}"
            )
        loaded = loaded[split]
    return loaded
