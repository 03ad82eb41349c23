"""Test loading rows from files, folders, Python objects and mixtures, and the errors for broken files."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlqwen.config import SourceConfig
from rlqwen.data import as_rows, load_rows
from rlqwen.data import row_files as files
from rlqwen.data.sources import read_source
from rlqwen.errors import ConfigError, DataError

SAMPLES = Path(__file__).parents[1] / "samples"

USER = {"role": "user", "content": "q"}
ROWS = [{"prompt": f"{i} + 1 = ?", "solution": str(i + 1)} for i in range(4)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def load(path: Path | str, **options: Any) -> Sequence[dict[str, Any]]:
    return load_rows(SourceConfig(path=str(path), **options), seed=0)


def write_all_formats(folder: Path) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    write_jsonl(folder / "a.jsonl", ROWS)
    (folder / "b.json").write_text(json.dumps(ROWS, indent=1))
    write_jsonl(folder / "c.json", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
    (folder / "e.csv").write_text("prompt,solution\n" + "".join(f"{r['prompt']},{r['solution']}\n" for r in ROWS))
    (folder / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n"))
    return sorted(folder.iterdir())


def test_every_file_format_gives_the_same_rows_and_a_folder_gives_all_files(tmp_path: Path) -> None:
    files = write_all_formats(tmp_path)
    assert len(files) == 6
    for file in files:
        assert load(file) == ROWS, file.name
    assert load(tmp_path) == ROWS * 6
    assert load(tmp_path, limit=5) == ROWS + ROWS[:1]


def test_csv_values_stay_text_and_may_have_quoted_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,solution\n"a, b\nc",007\n')
    assert load(tmp_path / "a.csv") == [{"prompt": "a, b\nc", "solution": "007"}]
    (tmp_path / "b.csv").write_text("prompt,solution\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"b\.csv, line 3: the header names 2 columns, this row has more"):
        load(tmp_path / "b.csv")


def test_a_dataset_saved_to_disk_loads(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved") == ROWS
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"dataset with splits; give the folder of one split: it holds: .*train/"):
        load(tmp_path / "splits")
    assert load(tmp_path / "splits" / "train") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "1"}\n\n{"prompt": oops}\n',
            r"a\.jsonl, line 3: not valid JSON .*'\{\"prompt\": oops\}'",
        ),
        ("a.jsonl", b'{"prompt": "1"}\n[1, 2]\n', r"a\.jsonl, line 2: a row must be a JSON object, this is a list"),
        pytest.param(
            *("a.jsonl", b'{"prompt": "1"}\n{"prompt": "\xff"}\n', r"a\.jsonl, line 2: not valid UTF-8 \(byte 0xff"),
            marks=pytest.mark.fault("broken UTF-8 in a data file", "refused, with file, line, byte and what to do"),
        ),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no rows"),
        ("a.json", b'[\n{"prompt": "1"},\n{"prompt": }\n]', r"a\.json, line 3: not valid JSON"),
        ("a.json", b'{\n"prompt": "1"}', r"must hold a list of objects, this one holds an object"),
        ("a.json", b'[{"prompt": "1"}, 3]', r"a\.json, row 1: a row must be a JSON object, this is a number"),
        ("a.json", b'[\n{"prompt": "\xff"}]', r"a\.json, line 2: not valid UTF-8"),
        ("a.json", b"", r"a\.json holds no rows"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        ("a.csv", b"prompt\n", r"a\.csv holds no rows"),
        ("a.parquet", b"PAR0", r"a\.parquet: not a valid Parquet file"),
        ("a.txt", b"hello", r"can't read files of type '\.txt'; known types: \.csv, \.json"),
    ],
)
def test_a_broken_file_raises_an_error_with_the_position(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_a_missing_path_raises_an_error_with_the_folder_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl; did you mean 'train\.jsonl'\? .*it holds"):
        load(tmp_path / "trian.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match=r"no file or folder .*/train; did you mean 'train\.jsonl'"):
        load(f"{tmp_path.name}/train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data file .*it is empty"):
        load(tmp_path / "empty")


def test_a_hub_id_is_loaded_from_the_hub_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the hub, to test only the arguments that we pass to it."""
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        if args[0] == "no/where":
            raise FileNotFoundError("no such dataset")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("openai/gsm8k", name="main", revision="abc", limit=2) == ROWS[:2]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "revision": "abc"})]
    with pytest.raises(DataError, match=r"no/where is not a local file or folder, and split 'test' .*no such dataset"):
        load("no/where", split="test")


def test_hub_keys_for_files_and_args_without_a_generator_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"is a local path: 'split' is for hub datasets"):
        load(path, split="train")
    with pytest.raises(DataError, match="'args' are for a generator"):
        load(path, args={"size": 3})


def test_columns_are_renamed_and_a_missing_column_raises_an_error_with_its_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "id": 1}, {"question": "q", "id": 2}])
    assert load(path, limit=1, columns={"prompt": "question", "solution": "answer", "completion": "answer"}) == [
        {"id": 1, "prompt": "q", "solution": "a", "completion": "a"}
    ]
    with pytest.raises(DataError, match=r"line 2: columns maps 'solution' to 'answer', which the row lacks"):
        load(path, columns={"solution": "answer"})
    with pytest.raises(DataError, match=r"line 1: .*did you mean 'question'\? It has: question, answer, id"):
        load(path, columns={"prompt": "questoin"})


def test_a_system_prompt_turns_prompts_into_conversations(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "c"}])
    assert load(path, system_prompt="Be brief.") == [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "c"}],
        }
    ]
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    path = write_jsonl(tmp_path / "b.jsonl", [{"messages": own}, {"messages": own[1:]}])
    first, second = load(path, system_prompt="Be brief.")
    assert [first["messages"][0]["content"], second["messages"][0]["content"]] == ["own", "Be brief."]
    with pytest.raises(DataError, match="system_prompt needs rows with messages or a prompt"):
        load(write_jsonl(tmp_path / "c.jsonl", [{"text": "t"}]), system_prompt="Be brief.")


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    "tools",
    [
        [tool("f", a={"type": "string"}), tool("g", b={"type": "integer"}), tool("h")],
        [tool("f", a={"type": ["string", "null"], "default": None, "enum": ["x", None]})],
        [tool("f", a={"type": "string", "default": None}, b={"type": "integer", "default": 3})],
        [
            tool("f", a={"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}),
            tool("g", b={"type": "string"}),
        ],
        [tool("f", a={"const": None}), tool("g", a={"type": "string"})],
    ],
)
def test_tools_are_the_same_from_an_arrow_table_as_from_json(tmp_path: Path, tools: Any) -> None:
    from datasets import Dataset

    turns = [USER, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "tools": [one]} for one in tools]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert load(write_jsonl(tmp_path / "a.jsonl", rows)) == rows
    for found in (as_rows(rows), as_rows(table), load(tmp_path / "a.parquet"), load(tmp_path / "saved")):
        assert found == rows


def mixture(tmp_path: Path, sizes: list[int], weights: list[float | None], seed: int = 0) -> list[str]:
    sources = []
    for name, size, weight in zip("abc", sizes, weights, strict=False):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i:03}"} for i in range(size)])
        sources.append(SourceConfig(path=str(path), weight=weight))
    return [row["text"] for row in load_rows(sources, seed=seed)]


def test_sources_without_weights_are_joined_and_interleaved(tmp_path: Path) -> None:
    rows = mixture(tmp_path, [30, 10], [None, None])
    assert len(set(rows)) == 40
    for name in "ab":
        own = [row for row in rows if row[0] == name]
        assert own == sorted(own)
    assert rows != sorted(rows)
    assert rows == mixture(tmp_path, [30, 10], [None, None])
    assert rows != mixture(tmp_path, [30, 10], [None, None], seed=1)


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([30, 10], [1.0, 1.0], [10, 10]),
        ([30, 10], [3.0, 1.0], [30, 10]),
        ([100, 50, 3], [0.5, 0.4, 0.1], [15, 12, 3]),
        ([100, 3], [None, 0.1], [30, 3]),
    ],
)
def test_weights_are_proportions_and_no_row_repeats(
    tmp_path: Path, sizes: list[int], weights: list[float | None], counts: list[int]
) -> None:
    rows = mixture(tmp_path, sizes, weights)
    assert [sum(row[0] == name for row in rows) for name in "abc"[: len(sizes)]] == counts
    assert len(set(rows)) == len(rows)


def test_a_generator_is_a_source() -> None:
    rows = load_rows(SourceConfig(generator="arithmetic", args={"size": 3}), seed=0)
    assert [set(row) for row in rows] == [{"prompt", "solution"}] * 3
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        load_rows(SourceConfig(generator="arithmetic", args={"sizes": 3}), seed=0)


def test_python_datasets_are_accepted_and_streams_are_not() -> None:
    from datasets import Dataset, DatasetDict, IterableDataset

    dataset = Dataset.from_list(ROWS)
    assert as_rows(dataset) == as_rows(ROWS) == as_rows(tuple(ROWS)) == ROWS
    ragged = Dataset.from_list(
        [{"messages": [USER, USER | {"name": "n"}], "prompt": None}, {"messages": None, "prompt": "p"}]
    )
    assert as_rows(ragged) == [{"messages": [USER, USER | {"name": "n"}]}, {"prompt": "p"}]
    for wrong, message in (
        (IterableDataset.from_generator(lambda: iter(ROWS)), r"not IterableDataset; take some rows of a stream"),
        (DatasetDict({"train": dataset, "test": dataset}), r"splits \(train, test\)"),
        ([], "the dataset is empty"),
        (["a"], "row 0: a row must be a dict"),
        ("train.jsonl", "not str"),
    ):
        with pytest.raises(DataError, match=message):
            as_rows(wrong)


@pytest.mark.parametrize(
    ("name", "columns", "count", "expected"),
    [
        ("word_problems.jsonl", {"prompt": "question", "solution": "answer"}, 24, {"prompt", "solution"}),
        ("instructions_zh.json", {}, 22, {"messages"}),
        ("tools.json", {}, 10, {"messages", "tools"}),
        ("pairs.json", {}, 13, {"prompt", "chosen", "rejected"}),
    ],
)
def test_files_in_formats_of_public_data_sets_load(
    name: str, columns: dict[str, Any], count: int, expected: set[str]
) -> None:
    rows = load(SAMPLES / name, columns=columns)
    assert len(rows) == count
    assert all(set(row) == expected for row in rows)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("questions", {"question", "answer"}),
        ("instructions_zh", {"instruction", "input", "output"}),
        ("pairs", {"chosen", "rejected"}),
    ],
)
def test_built_in_rows_load(name: str, columns: set[str]) -> None:
    rows = [row for _, row in read_source(SourceConfig(path=f"builtin:{name}", name="main", split="train"))]
    assert len(rows) >= 24
    assert all(set(row) == columns for row in rows)
    with pytest.raises(
        DataError, match=r"did you mean 'builtin:questions'\? there are: instructions_zh, pairs, questions"
    ):
        read_source(SourceConfig(path="builtin:question"))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_large_json_file_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    rows = [{"text": f"[{number}], 中{'}' * (number % 5)}", "list": [[], {"a": [number]}]} for number in range(40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    whole = load(path)
    monkeypatch.setattr(files, "WHOLE_BYTES", 0)
    monkeypatch.setattr(files, "_PART_CHARACTERS", 7)
    monkeypatch.setattr(files, "_read_whole_json", None)
    assert load(path) == whole == rows
    write_jsonl(path, rows)
    assert load(path) == rows


def test_a_large_json_file_of_one_line_is_never_in_memory_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(" " + json.dumps([{"text": "中" * 2000} for _ in range(600)], ensure_ascii=False), "utf-8-sig")
    monkeypatch.setattr(files, "WHOLE_BYTES", 0)
    monkeypatch.setattr(files, "_PART_CHARACTERS", 1000)
    assert peak_of_reading(path) < path.stat().st_size / 10


def test_only_some_parquet_rows_are_python_objects_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_list([{"text": f"{number}" * 400} for number in range(8000)]).to_parquet(path)
    assert peak_of_reading(path) < 8000 * 400 / 2


def test_a_parquet_file_that_is_damaged_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_list([{"text": f"{number}" * 9} for number in range(3000)]).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:4000] = b"\xff" * 3996
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read from row 0 on"):
        load(path)


def peak_of_reading(path: Path) -> int:
    """Return the peak number of bytes of Python objects while all rows are read one after the other."""
    tracemalloc.start()
    try:
        assert sum(1 for _ in files.read_rows(path))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_broken_json_file_gives_the_error_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WHOLE_BYTES", 0)
    for text, words in (
        ('[\n{"prompt": "1"},\n{"prompt": }\n]', r"a\.json, line 3: not valid JSON"),
        ('{\n"prompt": "1"}', r"must hold a list of objects, this one holds an object"),
        ('[{"prompt": "1"}, 3]', r"a\.json, row 1: a row must be a JSON object, this is a number"),
        ('[{"prompt": "1"}] []', r"a\.json, line 1: not valid JSON"),
        ('[{"prompt": "1"},]', r"a\.json, line 1: not valid JSON"),
        ("[]", r"a\.json holds no rows"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=words):
            load(tmp_path / "a.json")
