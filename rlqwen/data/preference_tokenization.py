"""Tokenize preference rows: a prompt with a chosen and a rejected answer, or one answer with a label.

Prompt and answers are rendered as in SFT (rlqwen.data.chat): the prompt ends in the generation prompt, and the loss
covers the text that the assistant wrote, including end-of-turn tokens. All answers to a prompt have the same prompt
tokens, even after truncation.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.reward import RewardConfig
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import MAX_EXAMPLES, DataReport, DropReason, RowIssue, format_examples, percentiles
from rlqwen.data.encoding import TokenizedRow, refuse, tokenize_rows, trim
from rlqwen.data.format_counts import FormatCounts, count_formats, count_row
from rlqwen.data.formats import normalize_row
from rlqwen.data.messages import to_messages
from rlqwen.data.preference_formats import read_columns, to_labelled_rows, to_pair_rows
from rlqwen.data.preference_renderer import AnswersRenderer, PreferenceRenderer
from rlqwen.data.preference_rows import LabelledCodec, LabelledRow, PairCodec, PreferenceRow
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob, data_settings
from rlqwen.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Item = TypeVar("Item")


def tokenize_preferences(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[Sequence[PreferenceRow], DataReport]:
    """Tokenize rows to preference pairs, in order.

    A pair is dropped and counted if it is too long, if an answer has no token in the loss, or if both answers are equal
    (before or after truncation). Raises DataError for a row that is not a pair, and if no pair is left. With a list
    `faults`, errors are appended to it instead.
    """
    return tokenize_all(rows, PairJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


def tokenize_labelled(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[Sequence[LabelledRow], DataReport]:
    """Tokenize rows to labelled answers, in order; a pair gives two. Counts and errors as in `tokenize_preferences`."""
    return tokenize_all(rows, LabelledJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


@dataclass(slots=True)
class _Answers:
    """Hold the token ids of a row: its prompt, and one or two answers with their columns."""

    index: int
    prompt_ids: list[int]
    answers: list[TokenizedRow]
    columns: list[Row]

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the longest answer, which `max_length` limits."""
        return len(self.prompt_ids) + max(len(answer.token_ids) for answer in self.answers)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt and all answers."""
        return len(self.prompt_ids) + sum(len(answer.token_ids) for answer in self.answers)


class AnswersJob(TokenizingJob[Item]):
    """Tokenize rows of answers, truncate them, and count dropped rows by reason."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: PreferenceConfig) -> None:
        super().__init__(tokenizer)
        self.config = config

    @cached_property
    def renderer(self) -> "AnswersRenderer":
        return PreferenceRenderer(self.tokenizer, self.config)

    def settings(self) -> Any:
        return data_settings(self.config, PreferenceConfig, excluded=("pad_token", "disable_dropout"))

    @abstractmethod
    def split(self, row: Row, where: str) -> list[Row]:
        """Return one row with `prompt` and `completion` per answer of a normalized row."""

    @abstractmethod
    def items(self, kept: list[_Answers], stats: TokenizationStats) -> list[Item]:
        """Build the items of the kept rows."""

    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[Item], TokenizationStats]:
        stats = TokenizationStats(DataReport(num_rows=len(rows)))
        report = stats.report
        found: dict[int, list[Row]] = {}

        def render(number: int, row: Row) -> list[list[TemplateSegment]]:
            where = f"row {number}"
            row = normalize_row(row, where)
            answers = found[number] = self.split(row, where)
            return self._segments(row, answers, where)

        kept: list[_Answers] = []
        for number, (prompt, *sequences) in tokenize_rows(start, rows, self.tokenizer, render, faults):
            answers = [_without_prompt(prompt, sequence) for sequence in sequences]
            whole = _Answers(number, prompt.token_ids, answers, found.pop(number))
            stats.lengths.append(whole.length)
            row = _truncate(whole, self.config)
            reason = self._drop_reason(row)
            if reason is not None:
                report.record(reason, number)
                report.num_dropped_tokens += whole.num_tokens
                continue
            if row.num_tokens < whole.num_tokens:
                report.record("truncated", number)
                report.num_cut_tokens += whole.num_tokens - row.num_tokens
            kept.append(row)
        self._count(kept, stats)
        return self.items(kept, stats), stats

    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        self.renderer.describe(report, count_formats(rows, self._count_format))

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = stats.report
        report.lengths = percentiles(stats.lengths)
        report.end_of_turn = stats.end_of_turn(self.config.eos_token or self.tokenizer.eos_token)
        report.name_unused()
        report.eos_in_loss = stats.counts["ended"] / max(stats.counts["answers"], 1)
        for issue, text in (
            ("equal_sides", "dropped pairs with equal answers, which teach nothing"),
            ("empty_answer", "empty answers, which teach the model to end its turn at once"),
        ):
            if numbers := report.rows.get(cast(RowIssue, issue)):
                examples = [f"row {number}" for number in numbers[:MAX_EXAMPLES]]
                report.warnings.append(f"{text}: {format_examples(examples, len(numbers))}")
        if not report.num_kept and not faults:
            refuse(DataError(self._nothing_left(report)), faults)
        return report

    def _segments(self, row: Row, answers: list[Row], where: str) -> list[list[TemplateSegment]]:
        first, completions = answers[0], [one["completion"] for one in answers]
        segments = self.renderer.segments(first["prompt"], completions, first.get("tools"), where)
        has_messages = any(not isinstance(one, str) for one in (first["prompt"], *completions))
        whole = [[*to_messages(first["prompt"], "user"), *to_messages(one, "assistant")] for one in completions]
        read = read_columns(row, has_messages=has_messages, margin=isinstance(self.config, RewardConfig))
        self.renderer.record_unused(row, read, whole if has_messages else [])
        return segments

    def _count_format(self, counts: FormatCounts, row: Row) -> None:
        row = normalize_row(row, "row")
        count_row(counts, row, self.split(row, "row"), lambda: self.renderer.format)

    def _drop_reason(self, row: _Answers) -> DropReason | None:
        if self.config.max_length is not None and row.length > self.config.max_length:
            return "overlong"
        if not all(True in answer.loss_mask for answer in row.answers):
            return "empty_mask"
        if len(row.answers) == 2 and row.answers[0].token_ids == row.answers[1].token_ids:
            return "equal_sides"
        return None

    def _count(self, kept: list[_Answers], stats: TokenizationStats) -> None:
        report, stop_ids, empty_answers = stats.report, self.renderer.stop_ids, self.renderer.empty_answers
        report.num_kept = len(kept)
        report.num_tokens = sum(row.num_tokens for row in kept)
        report.num_loss_tokens = sum(sum(answer.loss_mask) for row in kept for answer in row.answers)
        for row in kept:
            ended = [answer.token_ids[-1] in stop_ids for answer in row.answers]
            stats.counts.update(ended=sum(ended), answers=len(ended))
            if not all(ended):
                report.record("no_end", row.index)
            if any(tuple(answer.token_ids) in empty_answers for answer in row.answers):
                report.record("empty_answer", row.index)
        report.warnings = self.renderer.warnings()
        report.columns, report.message_keys = self.renderer.unused.pop_counts()
        stats.end_tokens = [self.renderer.end_token]

    def _nothing_left(self, report: DataReport) -> str:
        limit = self.config.max_length
        reasons = [
            (report.num_overlong, f"are longer than max_length={limit}"),
            (report.num_empty_mask, f"have an answer with no token in the loss within max_length={limit}"),
            (report.num_equal_sides, "have equal answers"),
        ]
        counts = "; ".join(f"{count} {what}" for count, what in reasons if count)
        return f"none of {report.num_rows} rows has anything to learn from: {counts} (lengths {report.lengths})"


class PairJob(AnswersJob[PreferenceRow]):
    """Tokenize rows to preference pairs."""

    codec = PairCodec()

    def split(self, row: Row, where: str) -> list[Row]:
        return to_pair_rows(row, where)

    def items(self, kept: list[_Answers], stats: TokenizationStats) -> list[PreferenceRow]:
        pairs = [
            PreferenceRow(row.index, row.prompt_ids, row.answers[0], row.answers[1], row.columns[0].get("margin"))
            for row in kept
        ]
        for row in kept:
            if "margin" not in row.columns[0]:
                stats.add_example("missing", f"row {row.index}")
            if (row.columns[0].get("margin") or 0) < 0:
                stats.add_example("negative", f"row {row.index}")
        return pairs

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = super().finish(stats, faults)
        if isinstance(self.config, RewardConfig) and 0 < stats.counts["missing"] < report.num_kept:
            report.warnings.append(
                f"margin missing and set to 0, although other rows have one: {stats.format_examples('missing')}"
            )
        if stats.counts["negative"]:
            examples = stats.format_examples("negative")
            report.warnings.append(f"margins below 0, as if the rejected answer were better: {examples}")
        return report


class LabelledJob(AnswersJob[LabelledRow]):
    """Tokenize rows to single answers with labels."""

    codec = LabelledCodec()

    def split(self, row: Row, where: str) -> list[Row]:
        return to_labelled_rows(row, where)

    def items(self, kept: list[_Answers], stats: TokenizationStats) -> list[LabelledRow]:
        labelled = [
            LabelledRow(row.index, row.prompt_ids, answer, columns["label"])
            for row in kept
            for answer, columns in zip(row.answers, row.columns, strict=True)
        ]
        stats.counts.update(str(row.label).lower() for row in labelled)
        return labelled

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = super().finish(stats, faults)
        labels = [label for label in ("true", "false") if stats.counts[label]]
        if len(labels) == 1:
            report.warnings.append(f"all labels are {labels[0]}: good and bad answers cannot be told apart")
        return report


def _without_prompt(prompt: TokenizedRow, sequence: TokenizedRow) -> TokenizedRow:
    """Return the tokens of a sequence after its prompt, up to the last token in the loss."""
    start = len(prompt.token_ids)
    assert sequence.token_ids[:start] == prompt.token_ids
    answer = TokenizedRow(sequence.token_ids[start:], sequence.loss_mask[start:])
    return trim(answer) if True in answer.loss_mask else answer


def _truncate(row: _Answers, config: PreferenceConfig) -> _Answers:
    """Truncate to `max_prompt_length`, then to `max_length` if the truncation mode allows it.

    With `keep_start`, a prompt that fills `max_length` leaves no tokens of the answers.
    """
    if config.max_prompt_length is not None:
        row = replace(row, prompt_ids=row.prompt_ids[-config.max_prompt_length :])
    excess = row.length - config.max_length if config.max_length is not None else 0
    if excess <= 0 or config.truncation_mode == "drop":
        return row
    if config.truncation_mode == "keep_end":
        # The answers stay whole, and at least one prompt token must remain.
        return replace(row, prompt_ids=row.prompt_ids[excess:]) if excess < len(row.prompt_ids) else row
    room = max(row.length - excess - len(row.prompt_ids), 0)
    answers = [TokenizedRow(answer.token_ids[:room], answer.loss_mask[:room]) for answer in row.answers]
    return replace(
        row,
        prompt_ids=row.prompt_ids[: config.max_length],
        answers=[trim(answer) if True in answer.loss_mask else answer for answer in answers],
    )
