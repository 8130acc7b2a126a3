"""Files, folders and the hub: what can be read, and that each failure tells the way to a copy."""

import json

import pytest

from sdjax.data import benchmarks, sources
from sdjax.data.problems import (
    DataConfig,
    ProblemSampler,
    known_names,
    load_problems,
    load_report,
    load_set,
)

ROWS = [{"prompt": f"What is {i}+1?", "answer": str(i + 1)} for i in range(5)]


def write(path, rows, form):
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jsonl", "jsonl"), ("a.json", "json"), ("a.json", "jsonl"), ("a.parquet", "parquet")],
)
def test_every_form_of_file(tmp_path, name, form):
    path = write(tmp_path / name, ROWS, form)
    assert list(sources.read_rows(path)) == ROWS


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Files from spreadsheets begin with one, and json.loads refuses it."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    assert list(sources.read_rows(str(path))) == ROWS


def test_a_folder_is_read_in_the_order_of_its_files_and_by_split(tmp_path):
    write(tmp_path / "test-00000.jsonl", ROWS[4:], "jsonl")
    write(tmp_path / "train-00001.parquet", ROWS[2:4], "parquet")
    write(tmp_path / "train-00000.jsonl", ROWS[:2], "jsonl")
    assert list(sources.read_rows(str(tmp_path), "train")) == ROWS[:4]
    assert list(sources.read_rows(str(tmp_path), "test")) == ROWS[4:]


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert list(sources.read_rows(str(tmp_path / "saved"), "train")) == ROWS
    with pytest.raises(ValueError, match="has the splits train"):
        list(sources.read_rows(str(tmp_path / "saved"), "test"))


def test_broken_json_is_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        list(sources.read_rows(str(path)))
    path.write_text('{"a": 1}\n[2]\n'.replace("[2]", "2"), encoding="utf-8")
    with pytest.raises(ValueError, match="row 1 is a int"):
        list(sources.read_rows(str(path)))


def test_a_named_source_is_found_below_sdjax_data_or_the_given_folder(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K, "jsonl")
    monkeypatch.setenv("SDJAX_DATA", str(tmp_path))
    assert load_problems(DataConfig(name="gsm8k", split="test"))[0].answer == "1234"
    monkeypatch.delenv("SDJAX_DATA")
    in_folder = load_problems(DataConfig(name="gsm8k", split="test", path=str(tmp_path)))
    as_file = DataConfig(name="gsm8k", path=str(tmp_path / "gsm8k" / "test.jsonl"))
    assert in_folder == load_problems(as_file)
    assert load_set("gsm8k", DataConfig(path=str(tmp_path))) == in_folder


GSM8K = [
    {"question": "How many?", "answer": "He has 2*617=<<2*617=1234>>1234.\n#### 1,234"},
    {"question": "And now?", "answer": "no gold here"},
]


def test_gsm8k_takes_gold_and_solution_apart(tmp_path):
    path = write(tmp_path / "test.jsonl", GSM8K[:1], "jsonl")
    problem = load_problems(DataConfig(name="gsm8k", path=path))[0]
    assert problem.answer == "1234"
    assert problem.solution == "He has 2*617=<<2*617=1234>>1234."
    assert problem.prompt.startswith("How many?\nPlease reason step by step")


OFFLINE = ["dapo_math", "gsm8k", "livecodebench_v6", "toolalpaca", "sciknoweval_physics"]


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_each_error_tells_how_to_use_a_local_copy(name, monkeypatch):
    """Without a network nobody may be left with a stack trace of an HTTP client."""
    monkeypatch.delenv("SDJAX_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", _no_network)
    with pytest.raises(ValueError) as error:
        load_problems(DataConfig(name=name))
    assert "config.data.path" in str(error.value) and "$SDJAX_DATA/" in str(error.value)
    assert "\n" not in str(error.value)


def _no_network(*args, **kwargs):
    raise ConnectionError("Couldn't reach the hub\nlong explanation")


def test_hub_data_go_through_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    cfg = DataConfig(name="hub", hub="someone/something", hub_config="main", split="train")
    assert [p.answer for p in load_problems(cfg)] == ["1", "2", "3", "4", "5"]
    assert calls == [(("someone/something", "main"), {"split": "train"})]
    with pytest.raises(ValueError, match="config.data.hub"):
        load_problems(DataConfig(name="hub"))


def test_wrong_names_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'dapo_math'"):
        load_problems(DataConfig(name="dapo_maths"))
    with pytest.raises(ValueError, match="'test', but dapo_math has train"):
        load_problems(DataConfig(name="dapo_math", split="test"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_problems(DataConfig(name="jsonl", path="/nowhere/x.jsonl"))
    with pytest.raises(ValueError, match="unknown ending"):
        list(sources.read_rows(__file__))
    assert {"synthetic", "aime24", "task_coverage_512", "hub"} <= set(known_names())


def test_synthetic_problems_by_split():
    train = load_problems(DataConfig(synthetic_size=20))
    test = load_set("test", DataConfig(synthetic_size=20))
    assert len(train) == len(test) == 20
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert len(load_set("ood_steps", DataConfig(), limit=3)) == 3


def test_the_length_filter_counts_rendered_tokens(tmp_path):
    class Words:
        chat_template = name_or_path = "words"

        def apply_chat_template(self, messages, **kwargs):
            return "<user> " + messages[-1]["content"]

        def encode(self, text, **kwargs):
            return list(range(len(text.split())))

    rows = [{"prompt": "a b c", "answer": "1"}, {"prompt": "a b c d e", "answer": "1"}]
    path = write(tmp_path / "a.jsonl", rows, "jsonl")
    cfg = DataConfig(name="jsonl", path=path, max_prompt_len=4)
    report = load_report(cfg, Words())
    assert (len(report.problems), report.too_long) == (1, 1)
    assert load_report(cfg).too_long == 0  # no tokenizer, no filter


def test_files_are_recognised_by_their_names():
    found = benchmarks.source_of_path
    assert found("/x/evaluation/aime24.parquet") == ("aime24", "")
    assert found("/x/tooluse/test.json") == ("toolalpaca", "test")
    assert found("/x/sciknoweval/physics/train.json") == ("sciknoweval_physics", "train")
    assert found("/x/sciknoweval/physics.json") == ("sciknoweval_physics", "")
    assert found("/x/mine.jsonl") is None


def test_config_section_and_dataclass_agree():
    """A default that differs between config.py and the dataclass would change runs in silence."""
    from sdjax import config

    c = config.base()
    ours = DataConfig.from_config(c)
    expected = DataConfig(enable_thinking=c.data.enable_thinking)
    assert ours == expected


def test_an_evaluation_set_never_falls_back_to_the_training_folder(tmp_path, monkeypatch):
    """config.data.path may be a folder of training files: they must not be graded as AIME."""
    train = tmp_path / "train"
    write(train / "mine.jsonl", ROWS, "jsonl")
    write(tmp_path / "root" / "evaluation" / "aime24.jsonl", ROWS, "jsonl")
    monkeypatch.setattr("datasets.load_dataset", _no_network)
    monkeypatch.delenv("SDJAX_DATA", raising=False)
    with pytest.raises(ValueError, match="could not be loaded from the hub"):
        load_set("aime24", DataConfig(name="jsonl", path=str(train)))


def test_an_evaluation_set_may_be_a_file_or_the_training_set(tmp_path):
    from sdjax import config

    path = write(tmp_path / "mine.jsonl", ROWS, "jsonl")
    assert [p.answer for p in load_set(path, DataConfig(), limit=2)] == ["1", "2"]
    c = config.base()
    c.data.name, c.data.path, c.data.subset_size = "jsonl", path, 2
    seen = load_set("train", c)
    sampler = ProblemSampler(load_problems(c.data), 64, c.seed, 2)
    assert {p.id for p in seen} == {p.id for p in sampler.batch(0)}  # METHODS 6.6: seen questions
