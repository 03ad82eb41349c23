"""Test training on a stream: the order of rows, exact resume, and settings that streams do not support."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from rlqwen import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlqwen.cli import main
from rlqwen.config import DataConfig
from rlqwen.config.data import SourceConfig
from rlqwen.data import find_prompts, load_recipe_data
from rlqwen.data.cleaning.texts import Row
from rlqwen.data.data_report import DataReport
from rlqwen.data.streams import StreamedRows, as_stream
from rlqwen.data.tokenization_job import TokenizationStats
from rlqwen.errors import ConfigError, DataError
from rlqwen.rollout.group_broadcast import pack_groups, unpack_groups
from rlqwen.rollout.prefetch import RolloutBatch
from rlqwen.runs.verification import compare_runs
from rlqwen.trainers import item_stream
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.types import Completion, Group, Prompt
from tests.narrowing import instance_of, present


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_stream, "WINDOW", 4)
    monkeypatch.setattr("rlqwen.trainers.prompt_data.WINDOW", 4)


def numbers(count: int, *, drop: Collection[int] = ()) -> ItemStream[Any]:
    """Return a stream of numbers without those in `drop`."""
    rows = StreamedRows("numbers", lambda epoch: iter([{"n": n, "epoch": epoch} for n in range(count)]))

    def make(start: int, window: list[dict[str, Any]]) -> tuple[list[tuple[Any, Any]], TokenizationStats]:
        assert [row["n"] for row in window] == list(range(start, start + len(window)))
        return [(row["epoch"], row["n"]) for row in window if row["n"] not in drop], TokenizationStats(
            DataReport(num_rows=len(window))
        )

    return ItemStream(rows, make)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_items_keep_their_order_in_every_epoch(count: int) -> None:
    stream = numbers(count)
    assert stream.peek(2, 3) == [divmod(place, count) for place in range(2, 5)]
    assert [stream.take(size) for size in (1, 5, 7)] == [
        [divmod(place, count) for place in range(start, stop)] for start, stop in ((0, 1), (1, 6), (6, 13))
    ]
    assert stream.epoch == 13 // count


def test_a_resumed_stream_repeats_and_loses_nothing() -> None:
    whole = numbers(10, drop={0, 1, 2, 3, 7}).take(30)
    for size in range(1, 20):
        before = numbers(10, drop={0, 1, 2, 3, 7})
        taken = before.take(size)
        before.peek(0, 9)
        after = numbers(10, drop={0, 1, 2, 3, 7})
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert taken + after.take(30 - size) == whole


def test_a_stream_without_usable_rows_is_refused() -> None:
    with pytest.raises(DataError, match="numbers: none of its 6 rows has anything to learn from"):
        numbers(6, drop=set(range(6))).take(1)
    with pytest.raises(DataError, match="none of its 0 rows"):
        numbers(0).take(1)
    assert numbers(6, drop={4, 5}).take(5) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {i} {'x' * (i % 7)}"},
            {"role": "assistant", "content": f"{i}" * 3},
        ]
    }
    for i in range(11)
]
PROMPTS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}], "solution": str(i + 1)} for i in range(9)]


def stream_of(rows: Sequence[dict[str, Any]]) -> Any:
    return Dataset.from_list(list(rows)).to_iterable_dataset()


def test_a_shuffling_dataset_has_a_new_order_in_each_epoch() -> None:
    stream = present(as_stream(stream_of([{"n": n} for n in range(20)]).shuffle(seed=1, buffer_size=8)))
    passes = [[row["n"] for row in stream.read(epoch)] for epoch in (0, 1, 0)]
    assert passes[0] == passes[2] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(20))
    assert [row["n"] for row in stream.read(1, 5)] == passes[1][5:]
    assert as_stream(CHATS) is as_stream(Dataset.from_list(CHATS)) is None


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def sft(model: Path, folder: Path, rows: list[dict[str, list[dict[str, str]]]], **options: Any) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder), per_device_train_batch_size=3, save_steps=2, max_steps=6, **options)
    return SFTTrainer(str(model), args, rows)


def grpo(model: Path, folder: Path, rows: Sequence[Row], **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        num_generations=2,
        max_completion_length=4,
        save_steps=2,
        max_steps=6,
        rollout={"engine": "transformers"},
        scoring={"in_process": ["prefers_even"]},
        **options,
    )
    return GRPOTrainer(str(model), prefers_even, args, rows)


@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [(sft, CHATS, {}), (sft, CHATS, {"packing": True, "max_length": 64}), (grpo, PROMPTS, {"beta": 0.1})],
    ids=["sft", "packed", "grpo"],
)
def test_a_resumed_run_on_a_stream_is_bit_exact(
    tiny_model_path: Path,
    tmp_path: Path,
    kind: Callable[..., SFTTrainer | GRPOTrainer],
    rows: Sequence[Row],
    options: dict[str, Any],
) -> None:
    kind(tiny_model_path, tmp_path / "straight", stream_of(rows), **options).train()
    kind(tiny_model_path, tmp_path / "run", stream_of(rows), **options).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    kind(tiny_model_path, tmp_path / "run", stream_of(rows), **options).train(resume_from_checkpoint=checkpoint)
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)
    other = kind(tiny_model_path, tmp_path / "run", stream_of(rows[1:]), **options)
    with pytest.raises(ConfigError, match=r"data\.train: was 'a stream that begins with"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_stream_trains_like_unshuffled_rows(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*CHATS, CHATS[0]]  # an epoch is four updates, so no batch crosses its end
    whole = sft(tiny_model_path, tmp_path / "whole", rows, shuffle_dataset=False)
    streamed = sft(tiny_model_path, tmp_path / "streamed", stream_of(rows))
    whole.train()
    streamed.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, streamed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert streamed.state.epoch == 1


def test_rows_of_different_epochs_are_distinguished_by_position() -> None:
    """Use positions, because rows are numbered from 0 in every epoch, and shuffling gives a number to another row."""
    prompts = [Prompt(place % 6, [place], str(place)) for place in range(16)]
    groups = [Group(prompt, [Completion([1], [-0.1], "stop", "")], 1, total_rewards_G=[1.0]) for prompt in prompts]
    assert [group.prompt for group in unpack_groups(pack_groups(groups[:8]), prompts[:8])] == prompts[:8]
    scorer: Any = SimpleNamespace(open_batch=lambda: None)
    plain = [{"prompt": prompt.index, "version": 1, "completions": [], "rewards": {}, "call_statuses": {}, "totals": [], "extras": {}}
             for prompt in prompts]  # fmt: skip
    state = {
        "name": "train/3",
        "version": 1,
        "groups": plain[8:],
        "counts": {"num_samples": [], "seconds": {}, "logged": {}},
    }
    assert [group.prompt for group in RolloutBatch.from_state(state, prompts, scorer, 8).score()] == prompts[8:]
    assert find_prompts(prompts[:6], [4, 1, 4]) == [prompts[4], prompts[1], prompts[4]]


def test_settings_that_streams_do_not_support_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    stream = stream_of(CHATS)
    endless = SFTConfig(output_dir=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="max_steps: the training data is a stream"):
        SFTTrainer(str(tiny_model_path), endless, stream)
    with pytest.raises(ConfigError, match="save_strategy: 'epoch' is unknown of a stream"):
        sft(tiny_model_path, tmp_path / "b", stream, save_strategy="epoch")
    with pytest.raises(ConfigError, match="DPOConfig cannot train on a stream"):
        DPOTrainer(str(tiny_model_path), None, DPOConfig(output_dir=str(tmp_path / "c"), max_steps=1), stream)
    with pytest.raises(DataError, match="row 0: nothing to learn"):
        sft(tiny_model_path, tmp_path / "d", stream_of([{"nothing": 1}]))
    source = {"path": "rows.jsonl", "streaming": True}
    for wrong, words in (
        ({"train": [source, source]}, "sources that are mixed"),
        ({"train": source, "eval": source}, "eval.streaming"),
        ({"train": source, "cleaning": {}}, "cleaning compares all rows"),
    ):
        with pytest.raises(ConfigError, match=words):
            DataConfig.parse(wrong)


def test_a_recipe_streams_a_file(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"chat": row["messages"]}) + "\n" for row in CHATS), "utf-8")
    source = SourceConfig(path=str(path), columns={"messages": "chat"}, streaming=True, limit=7)
    stream = instance_of(StreamedRows, load_recipe_data(DataConfig(train=source)).train)
    assert list(stream.read(0)) == list(stream.read(1)) == CHATS[:7]
    recipe = tmp_path / "recipe.yaml"
    data = {"train": {"path": str(path), "columns": {"messages": "chat"}, "streaming": True}}
    train = {"per_device_train_batch_size": 3, "max_steps": 5, "save_strategy": "no"}
    recipe.write_text(
        json.dumps(
            {
                "algorithm": "sft",
                "model": {"path": str(tiny_model_path)},
                "data": data,
                "train": train,
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    assert main(["check", str(recipe)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a stream, of which the first 11 rows are checked" in printed
    assert "5 updates in all" in printed
    assert main(["check", str(recipe), "train.max_steps=-1"]) == 2
    assert main(["run", str(recipe)]) == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "read and tokenized as training goes, in its own order" in printed
    assert "read of the stream: " in printed
    assert "EOS in the loss of 100%" in printed.split("read of the stream: ")[1]
