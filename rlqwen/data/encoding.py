"""Encode template segments to token ids, many rows at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from rlqwen.data.arrow_file import MASK, TOKENS, list_at
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(slots=True)
class TokenizedRow:
    """Hold one training sequence of T tokens."""

    token_ids: list[int]
    loss_mask: list[bool]
    """T values: whether token t is a target of the loss. The first token never is, because nothing predicts it."""


def tokenize_rows(
    start: int,
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    render: Callable[[int, Row], list[list[TemplateSegment]]],
    faults: list[DataError] | None = None,
) -> Iterator[tuple[int, list[TokenizedRow]]]:
    """Yield (row number, its sequences) in order; the first row has the number `start`.

    `render` returns the segments of each sequence of a row. A DataError that it raises is appended to `faults`; without
    that list it is raised.
    """
    batch: dict[int, list[list[TemplateSegment]]] = {}
    for number, row in enumerate(rows, start):
        try:
            batch[number] = render(number, row)
        except DataError as fault:
            refuse(fault, faults)
    encoded = iter(encode(tokenizer, [segments for sequences in batch.values() for segments in sequences]))
    for number, sequences in batch.items():
        yield number, list(islice(encoded, len(sequences)))


def refuse(fault: DataError, faults: list[DataError] | None) -> None:
    """Raise the fault, or append it to `faults` if there is such a list."""
    if faults is None:
        raise fault
    faults.append(fault)


def encode(tokenizer: "PreTrainedTokenizerBase", batch: list[list[TemplateSegment]]) -> list[TokenizedRow]:
    """Tokenize each distinct segment once, separately for control and ordinary text, and join the rows again."""
    ids: dict[tuple[bool, str], list[int]] = {}
    for is_control in (False, True):
        texts = list(
            dict.fromkeys(p.text for segments in batch for p in segments if p.is_control is is_control and p.text)
        )
        if texts:
            encoded = tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=not is_control,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            ids |= {(is_control, text): tokens for text, tokens in zip(texts, encoded, strict=True)}
    rows = []
    for segments in batch:
        row = TokenizedRow([], [])
        for segment in segments:
            tokens = ids[segment.is_control, segment.text] if segment.text else []
            row.token_ids += tokens
            row.loss_mask += [segment.in_loss] * len(tokens)
        row.loss_mask[:1] = [False] * len(row.loss_mask[:1])
        rows.append(row)
    return rows


def trim(row: TokenizedRow) -> TokenizedRow:
    """Drop the tokens after the last one in the loss, because they have no effect on training."""
    end = len(row.loss_mask) - row.loss_mask[::-1].index(True)
    return TokenizedRow(row.token_ids[:end], row.loss_mask[:end])


class SequenceCodec:
    """Convert training sequences to Arrow columns and back."""

    schema: ClassVar[pa.Schema] = pa.schema([("token_ids", TOKENS), ("loss_mask", MASK)])

    def encode(self, items: Sequence[TokenizedRow]) -> pa.RecordBatch:
        columns = [
            pa.array([row.token_ids for row in items], TOKENS),
            pa.array([row.loss_mask for row in items], MASK),
        ]
        return pa.record_batch(columns, schema=self.schema)

    def decode(self, batch: pa.RecordBatch, index: int) -> TokenizedRow:
        return TokenizedRow(list_at(batch.column(0), index), list_at(batch.column(1), index))
