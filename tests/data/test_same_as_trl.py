"""Test that rows of TRL's quickstart get the same tokens and labels as in TRL's trainers."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlqwen.config import DPOConfig, SFTConfig
from rlqwen.data import tokenize_preferences, tokenize_sft
from rlqwen.models.tiny import build_tiny_qwen3
from tests.narrowing import instance_of

USER, AGAIN = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "and 2+2?"}
PLAIN, THINKS = "2", "<think>\nhm\n</think>\n\n2"


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [USER, say(PLAIN)],
    [{"role": "system", "content": "Be brief."}, USER, say(THINKS)],
    [USER, say(PLAIN), AGAIN, say("4")],
    [USER, say(THINKS), AGAIN, say(THINKS)],
]
PAIRS = [
    {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [say(text)]}
    for turns, text in zip(CONVERSATIONS, ("3", "<think>\n?\n</think>\n\n3", THINKS, "5"), strict=True)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return str(build_tiny_qwen3(folder, hidden_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32))


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def theirs(model: str, rows: list[dict[str, Any]], folder: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Return (token ids, labels) of rows as TRL's SFTTrainer prepares them."""
    from trl import SFTConfig as TheirConfig
    from trl import SFTTrainer as TheirTrainer

    args = TheirConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **options)
    trainer = TheirTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
    return [(row["input_ids"], row["labels"]) for row in instance_of(Dataset, trainer.train_dataset)]


def ours(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[tuple[list[int], list[int]]]:
    out, _ = tokenize_sft(rows, tokenizer, SFTConfig(**options))
    return [
        (row.token_ids, [token if is_in else -100 for token, is_in in zip(row.token_ids, row.loss_mask, strict=True)])
        for row in out
    ]


def test_whole_conversations_have_the_tokens_and_labels_of_trl(model: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    expected = theirs(model, rows, tmp_path)
    for (ids, labels), (own_ids, own_labels) in zip(
        expected, ours(tokenizer, rows, assistant_only_loss=False), strict=True
    ):
        assert own_ids == ids
        assert own_labels[1:] == labels[1:]  # the first token has no loss in TRL either, because nothing predicts it
    for (ids, _), (own_ids, own_labels) in zip(expected, ours(tokenizer, rows), strict=True):
        # Reported at the start of a run: only assistant turns are learned, without the line break after them.
        assert tokenizer.decode(ids) == tokenizer.decode(own_ids) + "\n"
        assert {label for label in own_labels if label >= 0} < set(ids)


def test_turns_with_think_blocks_have_the_assistant_only_loss_of_trl(
    model: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    end, line = tokenizer.convert_tokens_to_ids(["<|im_end|>", "Ċ"])
    expected = theirs(model, rows, tmp_path, assistant_only_loss=True)
    for (ids, labels), (own_ids, own_labels) in zip(
        expected, ours(tokenizer, rows, preserve_thinking=True), strict=True
    ):
        assert [*own_ids, line] == ids
        without_breaks = [
            -100 if label == line and ids[place - 1] == end else label for place, label in enumerate(labels)
        ]
        assert own_labels == without_breaks[:-1]


def test_prompts_and_completions_have_the_tokens_and_labels_of_trl_except_the_last_line_break(
    model: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in CONVERSATIONS]
    for (ids, labels), (own_ids, own_labels) in zip(theirs(model, rows, tmp_path), ours(tokenizer, rows), strict=True):
        assert tokenizer.decode(ids[-1:]) == "\n"
        assert own_ids == ids[:-1]
        assert own_labels == labels[:-1]


def test_pairs_have_the_tokens_of_trl_except_the_last_line_break(model: str, tokenizer: Any, tmp_path: Path) -> None:
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    args = TheirConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = TheirTrainer(model=model, args=args, train_dataset=Dataset.from_list(PAIRS))
    pairs, _ = tokenize_preferences(PAIRS, tokenizer, DPOConfig())
    for row, pair in zip(instance_of(Dataset, trainer.train_dataset), pairs, strict=True):
        assert pair.prompt_ids == row["prompt_ids"]
        assert pair.chosen.token_ids == row["chosen_ids"][:-1]
        assert pair.rejected.token_ids == row["rejected_ids"][:-1]
