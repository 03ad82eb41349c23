"""Test that rows with images or videos are refused with a one-line error wherever they are loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer

from rlqwen import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlqwen.config import SourceConfig
from rlqwen.data.cleaning.texts import Row
from rlqwen.data.formats import normalize_row
from rlqwen.data.sources import as_rows, load_rows
from rlqwen.errors import DataError
from rlqwen.models.loading import text_tokenizer
from rlqwen.preflight import check_recipe
from rlqwen.preflight.dataset import check_dataset, find_target
from rlqwen.trainers.base import Trainer
from tests.preflight.test_recipe_check import recipe_of, the_fault

PIXELS = Image.new("RGB", (4, 4))
ASK, ANSWER = {"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a square"}
TEXT = {"messages": [ASK, ANSWER]}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
STORED = {"bytes": b"\x89PNG", "path": None}
GRPO = {"num_generations": 2, "per_device_train_batch_size": 2, "rollout": {"engine": "transformers"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TEXT | {"images": [PIXELS]}, r"^row 3: column 'images' holds media \(as Image\), and rlqwen trains on text alone"),
        (TEXT | {"image": PIXELS}, r"column 'image' holds media .* or the column image, if the text is complete"),
        (TEXT | {"picture": PIXELS}, "column 'picture' holds media"),
        (TEXT | {"picture": STORED}, "column 'picture' holds media"),
        (TEXT | {"images": [STORED]}, "column 'images' holds media"),
        (TEXT | {"images": np.array([STORED], dtype=object)}, "column 'images' holds media"),
        (TEXT | {"image": np.zeros((2, 2, 3))}, "column 'image' holds media"),
        (TEXT | {"image": "coco/000000033471.jpg"}, "column 'image' holds 'coco/000000033471.jpg'"),
        (TEXT | {"image": "iVBORw0KGgo" * 30}, "column 'image' holds"),
        (TEXT | {"images": ["000000033471"]}, "column 'images' holds '000000033471'"),
        (TEXT | {"video": "https://example.org/clip"}, "column 'video' holds"),
        ({"messages": [PARTS, ANSWER]}, r"message 0 of 'messages' has a part of type 'image', and rlqwen trains on text alone"),
        ({"prompt": [PARTS], "completion": [ANSWER]}, "message 0 of 'prompt' has a part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "?"}]}]}, "a part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "'input_audio'"),
        ({"messages": [ASK | {"images": ["a.png"]}, ANSWER]}, "message 0 of 'messages' has 'images'"),
        ({"prompt": [PARTS], "chosen": [ANSWER], "rejected": [ANSWER]}, "message 0 of 'prompt' has a part of type 'image'"),
    ],
)  # fmt: skip
def test_a_row_with_media_is_refused_with_advice(row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message) as fault:
        normalize_row(row, "row 3")
    assert "or train with TRL" in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    "column",
    [{"images": []}, {"images": "[]"}, {"images": None}, {"image": ""}, {"image": {"bytes": None, "path": None}}, {"image": float("nan")},
     {"image": 7}, {"image": "ghcr.io/org/sandbox:3"}, {"videos": np.array([])}, {"points": np.zeros(3)}],
)  # fmt: skip
def test_a_row_without_media_passes(column: dict[str, Any]) -> None:
    assert normalize_row(TEXT | column, "row")["messages"] == TEXT["messages"]


SMALL = {"per_device_train_batch_size": 2}
TRAINERS: dict[str, Callable[..., Trainer[Any, Any, Any]]] = {
    "sft": lambda model, train, held: SFTTrainer(model, SFTConfig(**SMALL), train, held),
    "dpo": lambda model, train, held: DPOTrainer(model, None, DPOConfig(**SMALL), train, held),
    "reward": lambda model, train, held: RewardTrainer(model, RewardConfig(**SMALL), train, held),
    "ppo": lambda model, train, held: PPOTrainer(model, len_of, PPOConfig(rollout=GRPO["rollout"]), train, held),
    "grpo": lambda model, train, held: GRPOTrainer(model, len_of, GRPOConfig(**GRPO), train, held),
}


def len_of(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def rows_for(algorithm: str) -> list[dict[str, Any]]:
    if algorithm == "sft":
        return [TEXT] * 4
    pair = {"chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "a circle"}]}
    return [{"prompt": [ASK]} | (pair if algorithm in ("dpo", "reward") else {})] * 4


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_every_trainer_refuses_media(
    algorithm: str, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a `datasets` table whose images are not decoded, plain rows, and eval rows."""
    monkeypatch.chdir(tmp_path)
    rows = rows_for(algorithm)
    with_image = [*rows[:3], rows[3] | {"images": [PIXELS]}]
    table = Dataset.from_list([row | {"images": [PIXELS]} for row in rows])
    for train, held in ((table, None), (with_image, None), (rows, with_image)):
        with pytest.raises(DataError, match=r"column 'images' holds media.*rlqwen trains on text alone"):
            TRAINERS[algorithm](str(tiny_model_path), train, held).train()


def test_files_and_tables_on_disk_with_media_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (TEXT, TEXT | {"image": "a.png"})))
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: column 'image' holds 'a.png'"):
        load_rows(SourceConfig(path=str(tmp_path / "rows.jsonl")), seed=0)
    table = Dataset.from_list([TEXT | {"images": []}, TEXT | {"images": [PIXELS]}])
    for path, write in (("table", table.save_to_disk), ("rows.parquet", table.to_parquet)):
        write(str(tmp_path / path))
        with pytest.raises(DataError, match="column 'images' holds media"):
            load_rows(SourceConfig(path=str(tmp_path / path)), seed=0)
    assert len(as_rows(table.remove_columns("images"))) == 2


def test_check_and_data_check_report_the_row_with_media(tiny_model_path: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [TEXT, TEXT | {"image": "a.png"}]
    fault = the_fault(check_recipe(recipe_of(tiny_model_path, rows, tmp_path)))
    assert "line 2: column 'image' holds 'a.png'" in str(fault)
    found = check_dataset(find_target(str(tmp_path / "rows.jsonl"), model=str(tiny_model_path)))
    assert "line 2: column 'image' holds 'a.png'" in str(found.parts)


def test_a_processor_is_replaced_by_its_tokenizer(tiny_model_path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)

    class Qwen3VLProcessor:
        chat_template = tokenizer.chat_template

        def __init__(self) -> None:
            self.tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)

    processor: Any = Qwen3VLProcessor()
    processor.tokenizer.chat_template = None
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2)
    with pytest.warns(UserWarning, match="processing_class is a Qwen3VLProcessor: its tokenizer alone"):
        trainer = SFTTrainer(str(tiny_model_path), args, [TEXT] * 2, processing_class=processor)
    assert trainer.processing_class is processor.tokenizer
    assert trainer.processing_class.chat_template == tokenizer.chat_template
    assert text_tokenizer(tokenizer) is tokenizer
    assert text_tokenizer(None) is None
