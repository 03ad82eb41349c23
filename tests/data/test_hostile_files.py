"""Test that data files from anybody give rows, or a message that names file and place, in time linear in their size."""

import json
import os
import random
import re
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from rlqwen.config import DPOConfig, RewardConfig, SFTConfig
from rlqwen.config.data import SourceConfig
from rlqwen.data import load_rows
from rlqwen.data.preference_tokenization import tokenize_labelled, tokenize_preferences
from rlqwen.data.prompts import tokenize_prompts
from rlqwen.data.reward_tokenization import tokenize_reward_rows
from rlqwen.data.sft_tokenization import tokenize_sft
from rlqwen.errors import DataError, InputError
from tests.odd_data import odd_file


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(SourceConfig(path=str(path)), seed=1)
    return str(caught.value)


def row_file(folder: Path, row: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_pipes_and_devices_are_not_read(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"device.{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        assert "is neither a file nor a folder, but a pipe, a socket or a device" in refusal(
            tmp_path / f"{name}.{suffix}"
        )
    assert "no data file" in refusal(tmp_path)


def test_a_column_of_parquet_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": [["a"]], "completion": ["b"]}), path)
    for name in (b"element", b"prompt"):
        (tmp_path / "odd.parquet").write_bytes(path.read_bytes().replace(name, name[:4] + b"\xff" + name[5:]))
        assert "not a valid Parquet file ('utf-8' codec" in refusal(tmp_path / "odd.parquet")


def test_damaged_parquet_gives_rows_or_a_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pa.table({"prompt": ["a" * 50] * 3000, "completion": [f"{i}" for i in range(3000)]}), path
    )
    whole, rng = path.read_bytes(), random.Random(5)
    for _ in range(30):
        damaged = bytearray(whole)
        for _ in range(10):
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        survive(lambda: load_rows(SourceConfig(path=str(path)), seed=1), "damaged pages")


def test_text_in_parquet_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 3, 6)), pa.py_buffer(b"abc\xff\xfe\xfd")]
    )
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": bad}), tmp_path / "rows.parquet")
    assert "rows.parquet, row 1: column 'completion' is not valid UTF-8 (byte 0xff at offset 0)" in refusal(
        tmp_path / "rows.parquet"
    )


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (
            {"prompt": "a", "completion": "b", "x": json.loads("[" * 300 + "]" * 300)},
            "column 'x' is nested more than 100",
        ),
        ({"messages": "[" * 100_000}, "line 1: column 'messages': must be JSON (maximum recursion"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "[" * 100_000}, "column 'tools' is not valid JSON"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a":' * 500 + "1" + "}" * 500}]}
                ]
            },
            "arguments of 'f': a value is nested more than 100 levels deep",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 1.5}]}, "calls must be a list of objects, not 1.5"),
        ({"instruction": "a", "output": "b", "history": True}, "'history' must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [[1, None]]}, "'history' must hold pairs"),
        ({"prompt": "a", "completion": "b", "x": {"\ud800": 1}}, "column 'x' holds half a surrogate pair"),
        ({"prompt": "a", "completion": "b", "\ud800": 1}, "holds half a surrogate pair"),
    ],
)
def test_values_that_no_template_can_write_are_named(tmp_path: Path, row: Any, found: str) -> None:
    assert found in refusal(row_file(tmp_path, row))


def conversation(turns: int) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(turns)]}


def calls(number: int) -> dict[str, Any]:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    return {"conversations": [{"from": "human", "value": "a"}, *[call] * number]}


@pytest.mark.parametrize(
    ("make", "small"),
    [
        (conversation, 1500),
        (calls, 4000),
        (lambda size: {"prompt": "a" * 100 * size, "completion": "b"}, 1000),
        (lambda size: {"instruction": "a", "output": "b", "history": [["a", "b"]] * size}, 1500),
    ],
)
def test_time_grows_with_the_size_of_a_row(
    make: Callable[[int], Any], small: int, tokenizer: Any, tmp_path: Path
) -> None:
    """Eight times the size takes 8 times the time if it is linear, and 64 times if it is quadratic."""

    def seconds(size: int) -> float:
        path = row_file(tmp_path, make(size))
        started = time.process_time()
        rows = load_rows(SourceConfig(path=str(path)), seed=1)
        if make is not calls:  # the template of the tiny model writes no calls
            tokenize_sft(rows, tokenizer, SFTConfig(max_length=None))
        return time.process_time() - started

    seconds(10)
    assert seconds(8 * small) < 25 * max(seconds(small), 0.02)


@pytest.mark.fault(
    "one line of 100 MB, whole or cut, in JSON Lines, JSON and CSV", "read, or named and refused, in seconds"
)
def test_one_line_of_100_mb_is_read_or_named(tmp_path: Path) -> None:
    text = "a" * 100_000_000
    for suffix, before, after in (("jsonl", '{"prompt": "', '", "completion": "b"}'), ("json", '[{"prompt": "', '", "completion": "b"}]'),
                                  ("csv", 'prompt,completion\n"', '",b\n')):  # fmt: skip
        path = tmp_path / f"rows.{suffix}"
        path.write_text(before + text + after)
        (row,) = load_rows(SourceConfig(path=str(path)), seed=1)
        assert row["prompt"] == text
        path.write_text(before + text)
        message = refusal(path)
        assert f"{path}, line" in message
        assert len(message) < 500
    (tmp_path / "rows.jsonl").write_text("[" * 100_000_000)
    assert "rows.jsonl, line 1: cannot be read as JSON" in refusal(tmp_path / "rows.jsonl")


@pytest.mark.fault("one row of 100,000 turns", "tokenized in time linear in its turns")
def test_one_row_of_100_000_turns_is_tokenized(tokenizer: Any, tmp_path: Path) -> None:
    rows = load_rows(SourceConfig(path=str(row_file(tmp_path, conversation(100_000)))), seed=1)
    (sequence,), _ = tokenize_sft(rows, tokenizer, SFTConfig(max_length=None))
    assert len(sequence.token_ids) > 100_000


def survive_odd_files(folder: Path, tokenizer: Any, *, seed: int, count: int) -> int:
    """Read and tokenize `count` odd files as each trainer does; return how many give rows. Fails for any error but a
    refusal of a few lines."""
    rng, given = random.Random(seed), 0
    uses: list[Callable[[Any], Any]] = [
        lambda rows: tokenize_sft(rows, tokenizer, SFTConfig(max_length=64)),
        lambda rows: tokenize_preferences(rows, tokenizer, DPOConfig()),
        lambda rows: tokenize_labelled(rows, tokenizer, DPOConfig.model_validate({"loss_type": "kto"})),
        lambda rows: tokenize_reward_rows(rows, tokenizer, RewardConfig()),
        lambda rows: tokenize_prompts(rows, tokenizer, max_prompt_length=64),
    ]
    for number in range(count):
        suffix, content = odd_file(rng)
        path = folder / f"odd{suffix}"
        path.write_bytes(content)
        source, what = SourceConfig(path=str(path)), f"file {number} of seed {seed}"
        rows = survive(lambda source=source: load_rows(source, seed=1), f"{what}: {content[:2000]!r}")
        given += bool(rows)
        for use in uses if rows else ():
            survive(lambda use=use, rows=rows: use(rows), f"{what}: {content[:2000]!r}")
    return given


def survive(use: Any, what: str) -> Any:
    """Return the result of `use`; None if it refuses its input in a few lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return use()
    except InputError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{error!r} for {what}") from error
    assert len(message) < 3000
    assert not re.search(r"'[^'\n]{230,}'", message)
    return None


def test_odd_files_give_rows_or_a_message(tokenizer: Any, tmp_path: Path) -> None:
    given = survive_odd_files(tmp_path, tokenizer, seed=13, count=60)
    assert 0 < given < 60


@pytest.mark.fault(
    "1,000 data files with random values and bytes", "each gives rows, or a message that names the place"
)
def test_many_odd_files_give_rows_or_a_message(tokenizer: Any, tmp_path: Path) -> None:
    given = sum(survive_odd_files(tmp_path, tokenizer, seed=seed, count=200) for seed in range(5))
    assert 0 < given < 1000
