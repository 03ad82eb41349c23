"""Rows and token ids on disk: the same values as in memory, in files that are shared, mended and found again."""

import datetime
import decimal
import json
import random

import pytest
from datasets import Dataset

from rlqwen.config import DataConfig
from rlqwen.config.cleaning import CleaningConfig
from rlqwen.config.data import SourceConfig
from rlqwen.data import as_rows, load_recipe_data, load_rows
from rlqwen.data import rows_on_disk as storage
from rlqwen.data.rows_on_disk import RowCodec, content_digest, encode_row, folder_of, keep_rows
from rlqwen.data.views import Joined, Mapped, Overlaid, Selected
from rlqwen.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def small_limits(tmp_path, monkeypatch):
    """A few rows are many here, and lie in a cache of the test's own."""
    monkeypatch.setenv("RLQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "STORED_FROM", 4)
    monkeypatch.setattr("rlqwen.data.sources.STORED_FROM", 4)
    monkeypatch.setattr(storage, "BATCH", 3)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(count):
    return [
        {"prompt": f"Was ist {n}?", "completion": "二" * n, "n": n, "f": n / 3, "list": [None, {"a": n}]}
        for n in range(count)
    ]


def test_views_act_as_lists():
    rows = list(range(10))
    view = Selected(rows, [3, 1, 4, 1, 5])
    assert view == [3, 1, 4, 1, 5]
    assert view[-1] == 5
    assert view[1:4] == [1, 4, 1]
    assert view[::-2] == [5, 4, 3]
    assert Joined([[1, 2], [], view]) == [1, 2, 3, 1, 4, 1, 5]
    assert Mapped(view, str)[2] == "4"
    assert Overlaid([{"a": 1}, {"a": 2}], {1: {"a": 3}}) == [{"a": 1}, {"a": 3}]
    assert view != [3]
    assert view != "31415"
    with pytest.raises(IndexError):
        view[5]


def test_many_rows_lie_in_a_file_and_come_back_equal(tmp_path):
    rows = rows_of(10)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_rows(SourceConfig(path=str(path)), seed=0)
    assert loaded == rows
    assert list(loaded) == rows
    assert loaded[7] == rows[7]
    assert loaded[2:5] == rows[2:5]
    assert not isinstance(loaded, list)
    assert folder_of(loaded) == tmp_path / "cache" / "data"
    (file,) = folder_of(loaded).glob("rows-*.arrow")
    before = file.stat().st_ino
    assert load_rows(SourceConfig(path=str(path)), seed=0).digest == loaded.digest
    assert file.stat().st_ino == before, "equal content is kept once"
    file.write_bytes(file.read_bytes()[:-100])
    assert load_rows(SourceConfig(path=str(path)), seed=0) == rows, "a damaged file is written anew"
    assert load_rows(SourceConfig(path=str(path), limit=3), seed=0) == rows[:3]
    assert not [one for one in folder_of(loaded).iterdir() if one.name.startswith(".writing")]


def test_values_that_json_lacks_come_back_as_they_were():
    row = {
        "b": b"\x00\xff",
        "d": datetime.date(2026, 1, 2),
        "t": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
        "c": datetime.time(1, 2),
        "delta": datetime.timedelta(days=1, microseconds=3),
        "decimal": decimal.Decimal("0.10"),
        "nan": [float("inf"), 1e-300, 2**70, "\ud800"],
    }
    batch = RowCodec().batch([encode_row(row)])
    assert RowCodec().decode(batch, 0) == row
    objects = [{"image": object()} for _ in range(6)]
    assert keep_rows(iter(objects)) == objects, "what no file can hold stays in memory"
    with pytest.raises(DataError, match="set cannot be kept on disk"):
        keep_rows(iter([*rows_of(8), {"a": {1}}]))


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(5))
    with pytest.raises(ConfigError, match=r"data cache .*file.*set data\.cache_dir"):
        load_rows(SourceConfig(path=str(path)), seed=0, cache_dir=tmp_path / "file" / "inside")
    data = load_recipe_data(DataConfig(train=SourceConfig(path=str(path)), cache_dir=str(tmp_path / "own")))
    assert folder_of(data.train) == tmp_path / "own"


def test_a_mixture_is_the_same_on_disk_as_in_memory(tmp_path, monkeypatch):
    sources = [
        SourceConfig(path=str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(size)])))
        for name, size in (("a", 12), ("b", 3), ("c", 7))
    ]
    weighted = [source.model_copy(update={"weight": 1.0 + place}) for place, source in enumerate(sources)]
    stored = [load_rows(mixture, seed=3) for mixture in (sources, weighted)]
    monkeypatch.setattr(storage, "STORED_FROM", 1000)
    monkeypatch.setattr("rlqwen.data.sources.STORED_FROM", 1000)
    kept = [load_rows(mixture, seed=3) for mixture in (sources, weighted)]
    assert stored == kept
    assert isinstance(kept[0], list)
    assert not isinstance(stored[0], list)
    assert len({content_digest(rows) for rows in [*stored, stored[0][::-1]]}) == 3


def test_cleaning_leaves_rows_on_disk(tmp_path):
    rows = [{"text": f"write to me{n}@example.com, please"} for n in range(9)] + [{"text": "write to me0@example.com"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[4]])
    cleaning = CleaningConfig(mask=["email"], exact_duplicates=True)
    data = load_recipe_data(DataConfig(train=SourceConfig(path=str(path)), cleaning=cleaning))
    assert len(data.train) == 2
    assert "example.com" not in data.train[1]["text"]
    assert folder_of(data.train) is not None


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_scripts_dataset_is_read_where_it_lies(shuffled):
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}]} for n in range(11)
    ]
    dataset = Dataset.from_list(rows)
    if shuffled:
        order = random.Random(0).sample(range(11), 9)
        dataset, rows = dataset.select(order), [rows[place] for place in order]
    view = as_rows(dataset)
    assert not isinstance(view, list)
    assert view == rows
    assert view[4] == rows[4]
    assert as_rows(view) is view
    given = as_rows(tuple(rows))
    assert not isinstance(given, list)
    assert given == rows
    assert content_digest(view) != content_digest(as_rows(dataset.select(range(8))))
    with pytest.raises(DataError, match="row 5: a row must be a dict"):
        list(as_rows([*rows[:5], "text"]))
