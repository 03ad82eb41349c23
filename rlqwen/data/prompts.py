"""Tokenize rows to prompts for sampling, in memory or with their token ids on disk."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rlqwen.data.arrow_file import TOKENS, ArrowRows, list_at
from rlqwen.data.chat import ChatFormat
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import DataReport, percentiles
from rlqwen.data.encoding import refuse, tokenize_rows
from rlqwen.data.format_counts import FormatCounts, count_formats, describe
from rlqwen.data.formats import normalize_row, to_prompt_row
from rlqwen.data.renderer import eos_warnings, kwarg_warnings
from rlqwen.data.rows_on_disk import content_digest
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob
from rlqwen.data.unused_columns import UnusedColumns
from rlqwen.data.views import View
from rlqwen.errors import DataError
from rlqwen.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def tokenize_prompts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int | None,
    overlong: Literal["drop", "refuse"] = "drop",
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    faults: list[DataError] | None = None,
    num_proc: int | None = None,
) -> tuple[Sequence[Prompt], DataReport]:
    """Tokenize rows to prompts for sampling, with the other columns for the rewards; `index` is the row number.

    Messages are rendered by the chat template and end in its generation prompt; text is not changed. A prompt of more
    than `max_prompt_length` tokens is dropped and counted, or refused with a DataError that lists the rows. With a list
    `faults`, errors are appended to it instead of being raised. The caller knows which columns the rewards read, so it
    calls `report.name_unused`.
    """
    job = PromptJob(
        tokenizer,
        max_prompt_length=max_prompt_length,
        overlong=overlong,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
    )
    return tokenize_all(rows, job, faults=faults, num_proc=num_proc)


class PromptCodec:
    """Convert row numbers and token ids of prompts to Arrow columns; the other fields come from the source row."""

    schema: ClassVar[pa.Schema] = pa.schema(
        [("index", pa.int64()), ("token_ids", TOKENS), ("opens_reasoning", pa.bool_())]
    )

    def encode(self, items: Sequence[Prompt]) -> pa.RecordBatch:
        columns = [
            pa.array([prompt.index for prompt in items], pa.int64()),
            pa.array([prompt.token_ids for prompt in items], TOKENS),
            pa.array([prompt.opens_reasoning for prompt in items], pa.bool_()),
        ]
        return pa.record_batch(columns, schema=self.schema)

    def decode(self, batch: pa.RecordBatch, index: int) -> tuple[int, list[int], bool]:
        return batch.column(0)[index].as_py(), list_at(batch.column(1), index), batch.column(2)[index].as_py()


class PromptJob(TokenizingJob[Prompt]):
    """Tokenize rows to prompts."""

    codec = PromptCodec()

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_prompt_length: int | None,
        overlong: Literal["drop", "refuse"],
        chat_template: str | None,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> None:
        super().__init__(tokenizer)
        self.limit, self.overlong = max_prompt_length, overlong
        self.template, self.template_kwargs = chat_template, chat_template_kwargs

    @cached_property
    def unused(self) -> UnusedColumns:
        return UnusedColumns()

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, chat_template=self.template, chat_template_kwargs=self.template_kwargs)

    def settings(self) -> Any:
        return [self.limit, self.overlong, self.template, self.template_kwargs]

    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[Prompt], TokenizationStats]:
        stats = TokenizationStats(DataReport(num_rows=len(rows)))
        report = stats.report
        unused, found = self.unused, dict[int, Row]()
        opening: set[int] = set()

        def render(number: int, row: Row) -> list[list[TemplateSegment]]:
            where = f"row {number}"
            given = normalize_row(row, where)
            row = found[number] = to_prompt_row(given, where)
            if isinstance(row["prompt"], str):
                unused.record_prompt(given, row)
                segments = [TemplateSegment(row["prompt"], True)]
            else:
                unused.record_prompt(given, row, self.chat.template.render_raw)
                segments = self.chat.prompt(row["prompt"], where, tools=row.get("tools"))
            if "".join(segment.text for segment in segments).rstrip().endswith("<think>"):
                opening.add(number)
            return [segments]

        prompts: list[Prompt] = []
        for number, (tokenized,) in tokenize_rows(start, rows, self.tokenizer, render, faults):
            length = len(tokenized.token_ids)
            stats.lengths.append(length)
            if not length:
                refuse(DataError(f"row {number}: the prompt is empty"), faults)
                continue
            if self.limit is not None and length > self.limit:
                stats.add_example("overlong", f"row {number} has {length}")
                report.record("overlong", number)
                report.num_dropped_tokens += length
                continue
            prompts.append(to_prompt(number, tokenized.token_ids, found.pop(number), number in opening))
        report.num_kept = len(prompts)
        report.num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        report.columns, report.message_keys = unused.pop_counts()
        report.warnings = kwarg_warnings(self.chat) if "chat" in vars(self) else []
        stats.end_tokens = [self.chat.template.end_of_turn if "chat" in vars(self) else self.tokenizer.eos_token]
        return prompts, stats

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = stats.report
        if report.num_overlong and (self.overlong == "refuse" or not report.num_kept):
            refuse(DataError(_too_long(stats, self.limit)), faults)
        report.lengths = percentiles(stats.lengths)
        report.end_of_turn = stats.end_of_turn(self.tokenizer.eos_token)
        report.warnings = eos_warnings(self.tokenizer, report.end_of_turn) + report.warnings
        return report

    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        def count(counts: FormatCounts, row: Row) -> None:
            counts.num_rows += 1
            counts.num_text += isinstance(to_prompt_row(normalize_row(row, "row"), "row")["prompt"], str)

        hint = "for a chat model make messages of them, for example with a system_prompt for the data source"
        describe(report, count_formats(rows, count), preserves=True, hint=hint, unlike_trl=[])

    def present(self, stored: ArrowRows[Any], rows: Sequence[Row]) -> Sequence[Prompt]:
        return StoredPrompts(stored, rows)


class StoredPrompts(View[Prompt]):
    """View prompts whose token ids are in an Arrow file and whose columns are in their source rows."""

    def __init__(self, stored: ArrowRows[tuple[int, list[int], bool]], rows: Sequence[Row]) -> None:
        self.stored, self.rows = stored, rows

    def __len__(self) -> int:
        return len(self.stored)

    def item(self, index: int) -> Prompt:
        number, token_ids, opens_reasoning = self.stored.item(index)
        return to_prompt(number, token_ids, prompt_row(number, self.rows[number]), opens_reasoning)

    @cached_property
    def digest(self) -> str:
        """Return a digest of the whole content, including the other columns of the rows."""
        return hashlib.blake2b(f"{self.stored.digest}{content_digest(self.rows)}".encode(), digest_size=16).hexdigest()


def find_prompt(prompts: Sequence[Prompt], index: int) -> Prompt:
    """Return the prompt of row `index`, which must exist; prompts are sorted by row number."""
    if not isinstance(prompts, View):
        return next(prompt for prompt in prompts if prompt.index == index)
    found: Prompt = prompts.item(bisect_left(prompts, index, key=lambda prompt: prompt.index))
    return found


def find_prompts(prompts: Sequence[Prompt], indices: Sequence[int], start: int = 0) -> list[Prompt]:
    """Return the prompts of these rows: a slice from `start` if it has exactly these rows in order, else by index.

    Each pass over a stream numbers its rows from 0, so two prompts of a stream may have the same index.
    """
    slice_ = prompts[start : start + len(indices)]
    if [prompt.index for prompt in slice_] == list(indices):
        return list(slice_)
    found = {index: find_prompt(prompts, index) for index in set(indices)}
    return [found[index] for index in indices]


def longest_prompt(prompts: Sequence[Prompt]) -> int:
    """Return the number of tokens of the longest prompt; 0 for none."""
    if isinstance(prompts, StoredPrompts):
        return max(pc.max(chunk.value_lengths()).as_py() or 0 for chunk in prompts.stored.column("token_ids"))
    return max((len(prompt.token_ids) for prompt in prompts), default=0)


def prompt_row(number: int, row: Row) -> Row:
    """Return a row with its prompt and the columns that rewards read."""
    return to_prompt_row(normalize_row(row, f"row {number}"), f"row {number}")


def to_prompt(number: int, token_ids: list[int], row: Row, opens_reasoning: bool) -> Prompt:
    """Build a prompt from a row of `prompt_row`, which is modified."""
    content = row.pop("prompt")
    return Prompt(number, token_ids, content, row, opens_reasoning=opens_reasoning)


def _too_long(stats: TokenizationStats, limit: int | None) -> str:
    return (
        f"{stats.report.num_overlong} of {stats.report.num_rows} prompts are longer than max_prompt_length={limit} "
        f"tokens: {stats.format_examples('overlong')}; raise it, or shorten them"
    )
