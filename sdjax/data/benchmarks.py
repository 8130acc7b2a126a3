"""The named data sets of the papers: where their files are and how one row becomes a problem.

Each entry of SOURCES stands on one line of facts: local file names, the hub's name, the prompt
style, the reward that fits. Readers take the raw row of the public format. Nothing is downloaded
at import, and no benchmark data is part of this package.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data.columns import Columns, RowError, lookup, make_problem, read_row
from sdjax.data.sources import Row
from sdjax.records import Problem

Reader = Callable[[Row, int, Columns, str], Problem]
SUBJECTS = ("biology", "chemistry", "material", "physics")
COVERAGE = {1: "seen_1x64", 8: "seen_8x8", 64: "seen_64", 128: "seen_128", 512: "seen_512"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One named data set. `files` are tried below config.data.path and SDJAX_DATA, in order.

    `{split}` in a file name becomes the split. `split_10` cuts one unsplit file into 90 % train and
    10 % test. `reward` names the verifier that its golds are meant for.
    """

    files: tuple[str, ...]
    hub: str = ""
    hub_config: str = ""
    hub_files: str = ""
    splits: tuple[str, ...] = ("train",)
    hub_splits: tuple[str, ...] = ()  # where the hub names them differently
    style: str = "boxed"
    reward: str = "math"
    read: Reader = read_row
    split_10: bool = False
    distinct: str = "prompt"  # what two copies of a problem have in common: prompt or id


def read_gsm8k(row: Row, index: int, columns: Columns, style: str) -> Problem:
    """GSM8K: the gold is what follows `####` in the worked answer."""
    worked = lookup(row, columns.answer or "answer")
    question = lookup(row, columns.prompt or "question")
    if not isinstance(worked, str) or "####" not in worked:
        return read_row(row, index, columns, style)  # already in the common format
    solution, _, gold = worked.rpartition("####")
    if not (question and gold.strip()):
        raise RowError("the question or the gold after '####' is empty")
    return make_problem(
        identity=f"gsm8k-{index}",
        text=question,
        answer=gold.strip().replace(",", ""),
        solution=solution.strip(),
        style=style,
        meta={"row": index, "source": "gsm8k"},
    )


def read_choice(row: Row, index: int, columns: Columns, style: str) -> Problem:
    """SciKnowEval as SDPO prepares it: options in the prompt, the answer's letter as gold."""
    problem = read_row(row, index, columns, style)
    letter = problem.answer.strip().upper()
    if len(letter) != 1 or not letter.isalpha():
        raise RowError(f"the gold {problem.answer!r} is not a single letter")
    return dataclasses.replace(problem, answer=letter)


def read_tool(row: Row, index: int, columns: Columns, style: str) -> Problem:
    """ToolAlpaca: the gold is a JSON list of {"Action", "Action_Input"}."""
    problem = read_row(row, index, columns, style)
    try:
        calls = json.loads(problem.answer)
    except ValueError as error:
        raise RowError(f"the gold is not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    whole = [isinstance(c, dict) and c.get("Action") and "Action_Input" in c for c in calls]
    if not calls or not all(whole):
        raise RowError("the gold is no list of calls with Action and Action_Input")
    return dataclasses.replace(problem, answer=json.dumps(calls, ensure_ascii=False))


LCB_FORMAT = (
    "\n\n### Format: {how}\n```python\n{code}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)


def read_livecodebench(row: Row, index: int, columns: Columns, style: str) -> Problem:
    """LiveCodeBench: statement and starter code as the prompt, all tests as JSON in the gold."""
    if "question_content" not in row:
        return read_row(row, index, columns, style)  # already in the common format
    starter = row.get("starter_code") or ""
    if starter.strip():
        how = "You will use the following starter code to write the solution to the problem and "
        how += "enclose your code within delimiters."
    else:
        how = "Read the inputs from stdin solve the problem and write the answer to stdout (do not "
        how += (
            "directly test on the sample inputs). Enclose your code within delimiters as follows."
        )
    text = "### Question:\n" + row["question_content"].strip()
    text += LCB_FORMAT.format(how=how, code=starter or "# YOUR CODE HERE")
    tests = _lcb_tests(row.get("public_test_cases")) + _lcb_tests(row.get("private_test_cases"))
    if not tests:
        raise RowError("the problem has no tests")
    metadata = row.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    gold: dict[str, Any] = {
        "inputs": [t["input"] for t in tests],
        "outputs": [t["output"] for t in tests],
        "fn_name": metadata.get("func_name") or None,  # None: a program that reads stdin
    }
    return Problem(
        id=str(row.get("question_id", index)),
        prompt=text,
        answer=json.dumps(gold),
        meta={
            "row": index,
            "source": "livecodebench",
            "question": row["question_content"].strip(),
            "date": str(row.get("contest_date", "")),
            "difficulty": row.get("difficulty", ""),
        },
    )


def _lcb_tests(value: Any) -> list[dict[str, str]]:
    """Test cases as plain JSON, or as the release packs them: base64, zlib, a pickled string."""
    if not value:
        return []
    if not isinstance(value, str):
        return list(value)
    try:
        return json.loads(value)
    except ValueError:
        pass  # the packed form, below
    try:
        packed = zlib.decompress(base64.b64decode(value))
        return json.loads(_PlainUnpickler(io.BytesIO(packed)).load())
    except (ValueError, TypeError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise RowError(f"the tests cannot be unpacked: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled text only: a pickle from a data file must not be able to run code."""

    def find_class(self, module, name):
        """Raises UnpicklingError: text needs no class."""
        raise pickle.UnpicklingError(f"refused to load {module}.{name} from a data file")


def split_rows(rows: list[Row], split: str, seed: int = 42) -> list[tuple[int, Row]]:
    """90 % train and 10 % test of unsplit rows, with the row's index in the whole file.

    The permutation and the rounding are those of `datasets.train_test_split(0.1, seed=42)`, with
    which the released subsets were made.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = math.ceil(0.1 * len(rows))
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return [(int(i), rows[i]) for i in chosen]


_TEST = ("test",)
SOURCES: dict[str, Source] = {
    "dapo_math": Source(
        ("dapo_math/train.parquet", "math/train.parquet", "dapo-math-17k.parquet", "dapo_math"),
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
    ),
    "aime24": Source(
        ("evaluation/aime24.parquet",), hub="HuggingFaceH4/aime_2024", splits=_TEST,
        hub_splits=("train",),
    ),
    "aime25": Source(("evaluation/aime25.parquet",), hub="math-ai/aime25", splits=_TEST),
    "amc23": Source(("evaluation/amc23.parquet",), hub="math-ai/amc23", splits=_TEST),
    "math500": Source(
        ("evaluation/math500.parquet",), hub="HuggingFaceH4/MATH-500", splits=_TEST
    ),
    "gsm8k": Source(
        ("gsm8k/{split}.parquet", "gsm8k/{split}.jsonl", "gsm8k"), hub="openai/gsm8k",
        hub_config="main", splits=("train", "test"), read=read_gsm8k,
    ),
    "toolalpaca": Source(
        ("tooluse/{split}.json", "toolalpaca/{split}.json"), splits=("train", "test"),
        style="as_is", reward="tool", read=read_tool,
    ),
    "livecodebench_v6": Source(
        ("livecodebench/test6.jsonl", "livecodebench/livecodebench_v6.jsonl", "livecodebench"),
        hub="livecodebench/code_generation_lite", hub_files="test6.jsonl", splits=_TEST,
        style="as_is", reward="code", read=read_livecodebench,
    ),
}  # fmt: skip
SOURCES |= {
    f"sciknoweval_{subject}": Source(
        (f"sciknoweval/{subject}/{{split}}.json", f"sciknoweval/{subject}.json"),
        splits=("train", "test"), style="as_is", reward="choice", read=read_choice, split_10=True,
    )
    for subject in SUBJECTS
}  # fmt: skip
SOURCES |= {
    # by id: one question of the 512 stands there twice under two ids, and the paper trained on both
    f"task_coverage_{size}": Source((f"task_coverage/{stem}.parquet",), distinct="id")
    for size, stem in COVERAGE.items()
}


def source_of_path(path: str) -> tuple[str, str] | None:
    """(name, split) of the source that keeps a file under this name, None for an unknown file.

    An unsplit file has the split "". The last two parts of the path decide.
    """
    tail = "/".join(Path(path).parts[-2:])
    for name, source in SOURCES.items():
        for file in source.files:
            for split in source.splits:
                ending = "/".join(Path(file.format(split=split)).parts[-2:])
                if tail == ending:
                    return name, split if "{split}" in file else ""
    return None
