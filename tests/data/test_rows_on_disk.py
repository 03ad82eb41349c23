"""Test rows and token ids on disk: values equal those in memory, and files are shared, repaired and reused."""

import copy
import datetime
import decimal
import errno
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlqwen.checkpoint.fingerprint import digest_rows
from rlqwen.config import DataConfig, DPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlqwen.config.cleaning import CleaningConfig
from rlqwen.config.data import SourceConfig
from rlqwen.config.evaluation import EvalGenerationConfig
from rlqwen.data import (
    TokenizedRow,
    as_rows,
    find_prompt,
    load_recipe_data,
    load_rows,
    longest_prompt,
    tokenization,
    tokenize_labelled,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_reward_rows,
    tokenize_sft,
    worker_pool,
)
from rlqwen.data import rows_on_disk as storage
from rlqwen.data.data_cache import disk_errors_as_config_errors, scratch_folder
from rlqwen.data.data_report import DataReport
from rlqwen.data.rows_on_disk import RowCodec, content_digest, encode_row, folder_of, store_rows
from rlqwen.data.sequence_packing import pack_best_fit
from rlqwen.data.sft_tokenization import SFTJob
from rlqwen.data.streams import StreamedRows
from rlqwen.data.tokenization import count_processes, digest_of_job
from rlqwen.data.views import Joined, Mapped, Overlaid, Selected
from rlqwen.errors import ConfigError, DataError, ResourceError


@pytest.fixture(autouse=True)
def small_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the row limits, so that a few rows are stored on disk, in a cache folder of this test."""
    monkeypatch.setenv("RLQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "STORED_FROM", 4)
    monkeypatch.setattr(tokenization, "BATCH", 3)
    monkeypatch.setattr(storage, "BATCH", 3)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Was ist {n}?", "completion": "二" * n, "n": n, "f": n / 3, "list": [None, {"a": n}]}
        for n in range(count)
    ]


def test_views_behave_like_lists() -> None:
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


def test_many_rows_are_stored_in_a_file_and_read_back_equal(tmp_path: Path) -> None:
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
    assert file.stat().st_ino == before, "equal content is stored once"
    file.write_bytes(file.read_bytes()[:-100])
    assert load_rows(SourceConfig(path=str(path)), seed=0) == rows, "a damaged file is written again"
    assert load_rows(SourceConfig(path=str(path), limit=3), seed=0) == rows[:3]
    assert not [one for one in folder_of(loaded).iterdir() if one.name.startswith(".writing")]


def test_values_that_json_lacks_are_read_back_unchanged() -> None:
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
    assert store_rows(iter(objects)) == objects, "objects that a file cannot hold stay in memory"
    with pytest.raises(DataError, match="set cannot be stored on disk"):
        store_rows(iter([*rows_of(8), {"a": {1}}]))


def test_an_unwritable_cache_raises_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(5))
    with pytest.raises(ConfigError, match=r"data cache .*file.*set data\.cache_dir"):
        load_rows(SourceConfig(path=str(path)), seed=0, cache_dir=tmp_path / "file" / "inside")
    data = load_recipe_data(DataConfig(train=SourceConfig(path=str(path)), cache_dir=str(tmp_path / "own")))
    assert not isinstance(data.train, StreamedRows)
    assert folder_of(data.train) == tmp_path / "own"


def test_errors_of_a_source_are_not_reported_as_cache_errors(tmp_path: Path) -> None:
    root = tmp_path / "cache" / "data"
    for error in (
        ConnectionError("the hub is away"),
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "image.png")),
        OSError(errno.EMFILE, "Too many open files"),
    ):
        with pytest.raises(type(error)) as caught, disk_errors_as_config_errors(root):
            raise error
        assert caught.value is error
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", str(root / "rows.arrow")),
        FileExistsError(errno.EEXIST, "File exists", str(root.parent)),
    ):
        with (
            pytest.raises(ConfigError, match=r"data cache .* cannot be written to"),
            disk_errors_as_config_errors(root),
        ):
            raise error


def test_digests_distinguish_long_arrays_and_accept_any_keys() -> None:
    arrays = [np.arange(2000), np.arange(2000)]
    arrays[1][1000] = 0
    assert len({content_digest([{"prompt": "1", "x": array}]) for array in arrays}) == 2
    keys = [{"prompt": "1", "x": {(1, n): 2}} for n in range(2)]
    assert len({content_digest([row]) for row in keys}) == 2


def test_a_mixture_is_the_same_on_disk_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        SourceConfig(path=str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(size)])))
        for name, size in (("a", 12), ("b", 3), ("c", 7))
    ]
    weighted = [source.model_copy(update={"weight": 1.0 + place}) for place, source in enumerate(sources)]
    stored = [load_rows(mixture, seed=3) for mixture in (sources, weighted)]
    monkeypatch.setattr(storage, "STORED_FROM", 1000)
    kept = [load_rows(mixture, seed=3) for mixture in (sources, weighted)]
    assert stored == kept
    assert isinstance(kept[0], list)
    assert not isinstance(stored[0], list)
    assert len({content_digest(rows) for rows in [*stored, stored[0][::-1]]}) == 3


def test_cleaned_rows_stay_on_disk(tmp_path: Path) -> None:
    rows = [{"text": f"write to me{n}@example.com, please"} for n in range(9)] + [{"text": "write to me0@example.com"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[4]])
    cleaning = CleaningConfig(mask=["email"], exact_duplicates=True)
    data = load_recipe_data(DataConfig(train=SourceConfig(path=str(path)), cleaning=cleaning))
    assert not isinstance(data.train, StreamedRows)
    assert len(data.train) == 2
    assert "example.com" not in data.train[1]["text"]
    assert folder_of(data.train) is not None


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_scripts_dataset_is_read_without_a_copy(shuffled: bool) -> None:
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


# Token ids


@pytest.mark.parametrize("count", [2, 9])
def test_rows_of_a_dataset_transform_are_trained(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    table = Dataset.from_list([{"question": f"{n}", "text": "as stored"} for n in range(count)])
    made = table.with_transform(lambda batch: {"text": [f"Q: {question}" for question in batch["question"]]})
    assert as_rows(made) == [{"text": f"Q: {n}"} for n in range(count)]
    rows, _ = tokenize_sft(as_rows(made), tokenizer, SFTConfig())
    assert str(tokenizer.decode(rows[1].token_ids)).startswith("Q: 1")
    assert as_rows(table.with_format("torch"))[1] == {"question": "1", "text": "as stored"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_path)


TURNS = [
    {"messages": [{"role": "user", "content": f"{n} + {n}"}, {"role": "assistant", "content": "=" * (1 + 5 * (n % 5))}]}
    for n in range(10)
]
TEXTS = [{"text": "1 + 1" * (1 + n % 4)} for n in range(8)]
PROMPTS = [{"prompt": "1" * (1 + n % 7), "solution": n, "more": {"a": [n]}} for n in range(11)]
PAIRS = [
    {
        "prompt": f"{n}",
        "chosen": "2" * (1 + n % 6),
        "rejected": "33" if n % 4 else "",
        "margin": None if n % 3 else n - 4,
    }
    for n in range(10)
]
LABELLED = [{"prompt": f"{n}", "completion": "4" * (n % 3 + 1), "label": bool(n % 2)} for n in range(9)]

CASES: dict[str, tuple[list[dict[str, Any]], Callable[..., tuple[Sequence[Any], DataReport]]]] = {
    "sft": (TURNS, lambda rows, tokenizer: tokenize_sft(rows, tokenizer, SFTConfig(max_length=24))),
    "sft dropped": (
        [*TURNS, *TEXTS],
        lambda rows, tokenizer: tokenize_sft(rows, tokenizer, SFTConfig(max_length=24, truncation_mode="drop")),
    ),
    "prompts": (PROMPTS, lambda rows, tokenizer: tokenize_prompts(rows, tokenizer, max_prompt_length=5)),
    "pairs": (PAIRS, lambda rows, tokenizer: tokenize_preferences(rows, tokenizer, DPOConfig(max_length=6))),
    "labelled": (LABELLED, lambda rows, tokenizer: tokenize_labelled(rows, tokenizer, DPOConfig())),
    "scored": (PAIRS, lambda rows, tokenizer: tokenize_reward_rows(rows, tokenizer, RewardConfig())),
}


@pytest.mark.parametrize("case", CASES)
def test_token_ids_on_disk_equal_those_in_memory(
    tokenizer: PreTrainedTokenizerBase,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows, tokenize = CASES[case]
    stored, report = tokenize(rows, tokenizer)
    assert not isinstance(stored, list)
    assert str(tmp_path / "cache" / "data" / "tokens-") in str(report.source)
    found, again = tokenize(rows, tokenizer)
    assert found == stored
    assert "tokenized before" in str(again.source)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "STORED_FROM", 1000)
        kept, expected = tokenize(rows, tokenizer)
    assert isinstance(kept, list)
    assert stored == kept
    assert [list(map(repr, part)) for part in (stored[2:4], [stored[-1]])] == [
        list(map(repr, part)) for part in (kept[2:4], [kept[-1]])
    ]
    assert replace(report, source=None) == replace(again, source=None) == expected
    assert digest_rows(stored) == digest_rows(found)
    (file,) = tmp_path.glob("cache/data/tokens-*/rows.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    mended, _ = tokenize(rows, tokenizer)
    assert mended == kept
    assert "is damaged (its digest does not match): the rows are tokenized again" in caplog.text


def test_the_cache_key_depends_on_rows_tokenizer_and_settings(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    keys = {digest_of_job(TURNS, SFTJob(tokenizer, SFTConfig()))}
    assert keys == {digest_of_job(TURNS, SFTJob(tokenizer, SFTConfig(learning_rate=1, packing=True, seed=1)))}
    keys.add(digest_of_job(TURNS[:-1], SFTJob(tokenizer, SFTConfig())))
    keys.add(digest_of_job(TURNS[::-1], SFTJob(tokenizer, SFTConfig())))
    keys.add(digest_of_job(TURNS, SFTJob(tokenizer, SFTConfig(max_length=7))))
    keys.add(digest_of_job(TURNS, SFTJob(tokenizer, SFTConfig(chat_template_kwargs={"enable_thinking": False}))))
    template = tmp_path / "template.jinja"
    for text in ("{{ messages }}", "{{ messages }}!"):
        template.write_text(text)
        keys.add(digest_of_job(TURNS, SFTJob(tokenizer, SFTConfig(chat_template_path=str(template)))))
    changed = copy.deepcopy(tokenizer)
    changed.chat_template += " "
    keys.add(digest_of_job(TURNS, SFTJob(changed, SFTConfig())))
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["<new>"])
    keys.add(digest_of_job(TURNS, SFTJob(changed, SFTConfig())))
    assert len(keys) == 9


def test_a_column_that_evaluation_reads_is_not_reported_as_unused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = [row | {"gold": "2"} for row in TURNS]
    evaluation = EvalGenerationConfig(metrics=["exact_match"], reference="gold")
    _, report = tokenize_sft(rows, tokenizer, SFTConfig())
    assert "columns not used: gold" in report.notes
    _, report = tokenize_sft(rows, tokenizer, SFTConfig(eval_generation=evaluation))
    assert not report.notes, "the rows are the same, and were tokenized before"


def test_every_setting_that_tokenization_reads_is_in_the_cache_key() -> None:
    """Check that no code reads keys that all trainers have, which are not in the cache key."""
    common = set(TrainerConfig.model_fields) - {"dataset_num_proc", "trust_remote_code"}
    for path in Path(tokenization.__file__).parent.glob("*.py"):
        read = set(re.findall(r"config\.(\w+)", path.read_text("utf-8")))
        assert not read & common, f"{path.name} reads keys that rlqwen.data.tokenization_job.data_settings leaves out"


def test_a_bad_row_among_many_raises_an_error_and_nothing_is_cached(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [*TURNS[:7], {"prompt": "no answer"}, *TURNS[7:], {"nothing": 1}]
    with pytest.raises(DataError, match="row 7: nothing to learn"):
        tokenize_sft(rows, tokenizer, SFTConfig())
    faults: list[Any] = []
    kept, report = tokenize_sft(rows, tokenizer, SFTConfig(), faults=faults)
    assert [str(fault)[:6] for fault in faults] == ["row 7:", "row 11"]
    assert len(kept) == report.num_kept == 10
    assert kept[9].token_ids == tokenize_sft(TURNS, tokenizer, SFTConfig())[0][9].token_ids
    with pytest.raises(DataError, match=r"7 of 11 prompts.*row 2 has 3, .* and 2 more"):
        tokenize_prompts(PROMPTS, tokenizer, max_prompt_length=2, overlong="refuse")
    assert len(list(tmp_path.glob("cache/data/tokens-*/"))) == 1
    assert not list(tmp_path.glob("cache/data/.writing*"))


def test_packed_rows_on_disk_equal_best_fit_in_memory(tokenizer: PreTrainedTokenizerBase) -> None:
    config = SFTConfig(max_length=40)
    rows, _ = tokenize_sft([*TURNS, *TURNS[3:], *TURNS[1:]], tokenizer, config)
    bins = pack_best_fit(rows, 40)
    expected: list[list[TokenizedRow]] = []
    for row in sorted(rows, key=lambda row: len(row.token_ids), reverse=True):
        room = [40 - sum(len(one.token_ids) for one in one_bin) for one_bin in expected]
        fits = [(left, place) for place, left in enumerate(room) if left >= len(row.token_ids)]
        if fits:
            expected[min(fits)[1]].append(row)
        else:
            expected.append([row])
    assert bins == expected == pack_best_fit(list(rows), 40)
    assert digest_rows(bins) != digest_rows(pack_best_fit(rows, 50))


def test_prompts_are_found_by_row_number(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, _ = tokenize_prompts(PROMPTS, tokenizer, max_prompt_length=5)
    assert [find_prompt(prompts, prompt.index) for prompt in prompts] == prompts
    assert longest_prompt(prompts) == longest_prompt(list(prompts)) == 5
    other, _ = tokenize_prompts([row | {"solution": 0} for row in PROMPTS], tokenizer, max_prompt_length=5)
    assert digest_rows(other) != digest_rows(prompts), "the digest covers the answers"


# In several processes


def test_several_processes_give_the_result_of_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [*TURNS, {"nothing": 1}, *TEXTS, *TURNS, {"nothing": 2}]
    faults: list[DataError] = []
    same_faults: list[DataError] = []
    alone, expected = tokenize_sft(rows, tokenizer, SFTConfig(dataset_num_proc=1), faults=faults)
    together, report = tokenize_sft(rows, tokenizer, SFTConfig(dataset_num_proc=2), faults=same_faults)
    assert together == alone
    assert digest_rows(together) == digest_rows(alone)
    assert replace(report, source=None) == replace(expected, source=None)
    assert [str(fault) for fault in same_faults] == [str(fault) for fault in faults] != []


def test_the_worker_pool_keeps_the_order_and_raises_the_first_error() -> None:
    parts: list[tuple[int, Any]] = [(number, 1009) for number in (20, 3, 11, 0, 2)]
    with closing(worker_pool.WorkerPool(2, pow, 7)) as pool:
        assert list(pool.map(iter(parts))) == [pow(7, start, modulus) for start, modulus in parts]
        parts += [(1, 0), (1, 1009)]
        with pytest.raises(ValueError, match="3rd argument cannot be 0"):
            list(pool.map(iter(parts)))


def test_all_workers_start_at_once_for_a_large_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the start with a job that is larger than a socket's buffer, which blocks until the worker reads it."""
    monkeypatch.setattr(worker_pool, "_BOOTSTRAP", "import time; time.sleep(20)")
    with closing(worker_pool.WorkerPool(2, os.path.join, "x" * 2**24)):
        pass


def test_a_dead_worker_raises_an_error_and_an_unpicklable_job_runs_in_process(
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with closing(worker_pool.WorkerPool(1, os.path.join, "job")) as pool:
        pool._workers[0]._process.kill()
        with pytest.raises(ResourceError, match="dataset_num_proc"):
            list(pool.map(iter([(0, [])])))
    stubborn = copy.copy(tokenizer)
    stubborn.of_its_own = lambda: None
    kept, _ = tokenize_sft(TURNS, stubborn, SFTConfig(dataset_num_proc=2))
    assert len(kept) == len(TURNS)
    assert "in one process, because this tokenizer cannot be pickled" in caplog.text


def test_the_number_of_processes_depends_on_rows_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [count_processes(None, rows) for rows in (100, 9_999, 10_000)] == [1, 1, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # one rank tokenizes while the others wait
    assert count_processes(None, 10_000) == 8
    assert count_processes(3, 10) == 3


def test_the_scratch_folder_of_a_killed_process_is_removed_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".writing-old", tmp_path / ".writing-new"
    for folder in (old, new):
        (folder / "data").mkdir(parents=True)
    for path in (old / "data", old):
        os.utime(path, (0, 0))
    with scratch_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == new.stat().st_mode & 0o777
    assert list(tmp_path.iterdir()) == [new]
