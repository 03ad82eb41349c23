"""Tokenize the preference examples of DPO and related losses: pairs, or single answers with a label."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlqwen.config.dpo import UNPAIRED, DPOConfig
from rlqwen.data.data_report import DataReport
from rlqwen.data.formats import normalize_row
from rlqwen.data.preference_formats import is_pair
from rlqwen.data.preference_rows import LabelledRow, PreferenceRow
from rlqwen.data.preference_tokenization import tokenize_labelled, tokenize_preferences
from rlqwen.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

_LABELS = {"label", "kto_tag"}


def tokenize_preference_examples(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: DPOConfig
) -> tuple[Sequence[PreferenceRow] | Sequence[LabelledRow], DataReport]:
    """Return pairs of all rows, in order, or single answers if a row is labelled.

    Raises DataError for labelled rows if a loss compares two answers.
    """
    labelled = next((number for number, row in enumerate(rows) if _is_labelled(row, number)), None)
    if labelled is None:
        return tokenize_preferences(rows, tokenizer, config)
    if config.needs_pairs:
        raise DataError(
            f"row {labelled} is a single answer with a label, but loss_type {', '.join(config.loss_type)} compares a "
            f"chosen with a rejected one; such rows need loss_type {' and '.join(sorted(UNPAIRED))}"
        )
    return tokenize_labelled(rows, tokenizer, config)


def _is_labelled(row: Row, number: int) -> bool:
    return not _LABELS.isdisjoint(row) and not is_pair(normalize_row(row, f"row {number}"))
