"""Preference rows to token ids: a prompt with a chosen and a rejected answer, or one answer with a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlqwen.data.report import DataReport
from rlqwen.data.tokenization import TokenizedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlqwen.config.preference import PreferenceConfig

Row = dict[str, Any]


@dataclass(slots=True)
class PreferenceRow:
    """A prompt and two answers to it; each answer goes on from the prompt's last token."""

    index: int
    """Row number in the dataset, from 0."""
    prompt_ids: list[int]
    chosen: TokenizedRow
    """Tokens after the prompt; in the loss are those that the assistant wrote, end-of-turn tokens included."""
    rejected: TokenizedRow
    margin: float | None = None
    """By how much the chosen answer is better, where the data says so."""


@dataclass(slots=True)
class LabelledRow:
    """A prompt and one answer that is good or bad."""

    index: int
    prompt_ids: list[int]
    completion: TokenizedRow
    label: bool


def tokenize_preferences(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: "PreferenceConfig"
) -> tuple[list[PreferenceRow], DataReport]:
    """Pairs of all rows, in order."""
    raise NotImplementedError


def tokenize_labelled(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: "PreferenceConfig"
) -> tuple[list[LabelledRow], DataReport]:
    """Labelled answers of all rows, in order; a pair gives two."""
    raise NotImplementedError
