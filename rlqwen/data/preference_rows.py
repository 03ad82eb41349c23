"""Define tokenized preference rows, a prompt with two answers or with one labelled answer, and store them on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from rlqwen.data.arrow_file import MASK, TOKENS, list_at
from rlqwen.data.encoding import TokenizedRow

_PROMPT = [("index", pa.int64()), ("prompt_ids", TOKENS)]


@dataclass(slots=True)
class PreferenceRow:
    """Hold a prompt and two answers to it; each answer continues after the prompt's last token."""

    index: int
    """Row number in the dataset, from 0."""
    prompt_ids: list[int]
    """Empty only for texts without a common prefix; then the first token of each answer is not in the loss."""
    chosen: TokenizedRow
    """Tokens after the prompt; the loss covers those that the assistant wrote, including end-of-turn tokens."""
    rejected: TokenizedRow
    margin: float | None = None
    """How much better the chosen answer is, if the data says so."""


@dataclass(slots=True)
class LabelledRow:
    """Hold a prompt and one answer that is good (`label` True) or bad."""

    index: int
    prompt_ids: list[int]
    completion: TokenizedRow
    label: bool


def _answer_fields(name: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_ids", TOKENS), (f"{name}_mask", MASK)]


def _answer_columns(answers: Sequence[TokenizedRow]) -> list[pa.Array]:
    return [
        pa.array([answer.token_ids for answer in answers], TOKENS),
        pa.array([answer.loss_mask for answer in answers], MASK),
    ]


def _prompt_columns(rows: "Sequence[PreferenceRow] | Sequence[LabelledRow]") -> list[pa.Array]:
    return [pa.array([row.index for row in rows], pa.int64()), pa.array([row.prompt_ids for row in rows], TOKENS)]


def _answer_at(batch: pa.RecordBatch, column: int, index: int) -> TokenizedRow:
    return TokenizedRow(list_at(batch.column(column), index), list_at(batch.column(column + 1), index))


class PairCodec:
    """Convert pairs to Arrow columns and back."""

    schema: ClassVar[pa.Schema] = pa.schema(
        [*_PROMPT, *_answer_fields("chosen"), *_answer_fields("rejected"), ("margin", pa.float64())]
    )

    def encode(self, items: Sequence[PreferenceRow]) -> pa.RecordBatch:
        columns = [
            *_prompt_columns(items),
            *_answer_columns([row.chosen for row in items]),
            *_answer_columns([row.rejected for row in items]),
            pa.array([row.margin for row in items], pa.float64()),
        ]
        return pa.record_batch(columns, schema=self.schema)

    def decode(self, batch: pa.RecordBatch, index: int) -> PreferenceRow:
        return PreferenceRow(
            batch.column(0)[index].as_py(),
            list_at(batch.column(1), index),
            _answer_at(batch, 2, index),
            _answer_at(batch, 4, index),
            batch.column(6)[index].as_py(),
        )


class LabelledCodec:
    """Convert labelled answers to Arrow columns and back."""

    schema: ClassVar[pa.Schema] = pa.schema([*_PROMPT, *_answer_fields("completion"), ("label", pa.bool_())])

    def encode(self, items: Sequence[LabelledRow]) -> pa.RecordBatch:
        columns = [
            *_prompt_columns(items),
            *_answer_columns([row.completion for row in items]),
            pa.array([row.label for row in items], pa.bool_()),
        ]
        return pa.record_batch(columns, schema=self.schema)

    def decode(self, batch: pa.RecordBatch, index: int) -> LabelledRow:
        return LabelledRow(
            batch.column(0)[index].as_py(),
            list_at(batch.column(1), index),
            _answer_at(batch, 2, index),
            batch.column(4)[index].as_py(),
        )
