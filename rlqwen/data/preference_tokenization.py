"""Preference rows to token ids: a prompt with a chosen and a rejected answer, or one answer with a label.

Prompt and answers are written as SFT writes them (rlqwen.data.chat): the prompt ends in the generation prompt, and of
an answer the loss covers what the assistant wrote, end-of-turn tokens included. The prompt's tokens are the same for
all answers to it, whatever is cut.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.reward import RewardConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import NAMED, DataReport, RowIssue, format_examples, percentiles
from rlqwen.data.encoding import TokenizedRow, refuse, tokenize_rows, trim
from rlqwen.data.format_counts import FormatCounts, count_formats, describe, note_row, unlike_trl
from rlqwen.data.formats import normalize_row
from rlqwen.data.messages import to_messages
from rlqwen.data.preference_formats import read_columns, to_labelled_rows, to_pair_rows
from rlqwen.data.preference_rows import LabelledCodec, LabelledRow, PairCodec, PreferenceRow
from rlqwen.data.renderer import Renderer
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob, data_settings
from rlqwen.data.unused_columns import UnusedColumns
from rlqwen.errors import DataError
from rlqwen.types import Message

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
    """Pairs of all rows, in order.

    Pairs that are too long, have an answer without a token in the loss, or two equal answers (as they are, or once
    cut) are left out and counted. Raises DataError for a row that is no pair, and if nothing is left; given a list of
    `faults`, puts them there instead.
    """
    return tokenize_all(rows, PairJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


def tokenize_labelled(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[Sequence[LabelledRow], DataReport]:
    """Labelled answers of all rows, in order; a pair gives two. Counts and errors as `tokenize_preferences`."""
    return tokenize_all(rows, LabelledJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


@dataclass(slots=True)
class _Answers:
    """A row on its way: its prompt and its one or two answers, each with its columns."""

    index: int
    prompt_ids: list[int]
    answers: list[TokenizedRow]
    columns: list[Row]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest answer: what `max_length` bounds."""
        return len(self.prompt_ids) + max(len(answer.token_ids) for answer in self.answers)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(answer.token_ids) for answer in self.answers)


class AnswersJob(TokenizingJob[Item]):
    """Tokenizes rows of answers, cuts them to length, and counts what is left out and why."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: PreferenceConfig) -> None:
        super().__init__(tokenizer)
        self.config = config

    @cached_property
    def renderer(self) -> "AnswersRenderer":
        return PreferenceRenderer(self.tokenizer, self.config)

    def settings(self) -> Any:
        return data_settings(self.config, PreferenceConfig, apart_from=("pad_token", "disable_dropout"))

    @abstractmethod
    def split(self, row: Row, where: str) -> list[Row]:
        """Return `prompt` and `completion` of each answer of a normalized row."""

    @abstractmethod
    def items(self, kept: list[_Answers], stats: TokenizationStats) -> list[Item]:
        """Make items of the rows that are kept."""

    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[Item], TokenizationStats]:
        stats = TokenizationStats(DataReport(num_rows=len(rows)))
        report = stats.report
        found: dict[int, list[Row]] = {}

        def write(number: int, row: Row) -> list[list[TemplateSegment]]:
            where = f"row {number}"
            row = normalize_row(row, where)
            answers = found[number] = self.split(row, where)
            return self._pieces(row, answers, where)

        kept: list[_Answers] = []
        for number, (prompt, *sequences) in tokenize_rows(start, rows, self.tokenizer, write, faults):
            answers = [_after(prompt, sequence) for sequence in sequences]
            whole = _Answers(number, prompt.token_ids, answers, found.pop(number))
            stats.lengths.append(whole.length)
            row = _cut(whole, self.config)
            fate = self._reason_to_leave_out(row)
            if fate is not None:
                report.record(fate, number)
                report.num_dropped_tokens += whole.num_tokens
                continue
            if row.num_tokens < whole.num_tokens:
                report.record("truncated", number)
                report.num_cut_tokens += whole.num_tokens - row.num_tokens
            kept.append(row)
        self._count(kept, stats)
        return self.items(kept, stats), stats

    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        self.renderer.describe(report, count_formats(rows, self._note_form))

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = stats.report
        report.lengths = percentiles(stats.lengths)
        report.end_of_turn = stats.end_of_turn(self.config.eos_token or self.tokenizer.eos_token)
        report.name_unused()
        report.eos_in_loss = stats.counts["ended"] / max(stats.counts["answers"], 1)
        for fate, text in (
            ("equal_sides", "pairs whose answers are equal, hence teach nothing, were left out"),
            ("empty_answer", "empty answers, which teach to end the turn at once"),
        ):
            if numbers := report.rows.get(cast(RowIssue, fate)):
                named = [f"row {number}" for number in numbers[:NAMED]]
                report.warnings.append(f"{text}: {format_examples(named, len(numbers))}")
        if not report.num_kept and not faults:
            refuse(DataError(self._nothing_left(report)), faults)
        return report

    def _pieces(self, row: Row, answers: list[Row], where: str) -> list[list[TemplateSegment]]:
        first, completions = answers[0], [one["completion"] for one in answers]
        segments = self.renderer.segments(first["prompt"], completions, first.get("tools"), where)
        has_turns = any(not isinstance(one, str) for one in (first["prompt"], *completions))
        whole = [[*to_messages(first["prompt"], "user"), *to_messages(one, "assistant")] for one in completions]
        read = read_columns(row, has_turns=has_turns, margin=isinstance(self.config, RewardConfig))
        self.renderer.note_unused(row, read, whole if has_turns else [])
        return segments

    def _note_form(self, form: FormatCounts, row: Row) -> None:
        row = normalize_row(row, "row")
        note_row(form, row, self.split(row, "row"), lambda: self.renderer.format)

    def _reason_to_leave_out(self, row: _Answers) -> RowIssue | None:
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
        report.columns, report.message_keys = self.renderer.unused.take()
        stats.end_tokens = [self.renderer.end_token]

    def _nothing_left(self, report: DataReport) -> str:
        limit = self.config.max_length
        reasons = [
            (report.num_overlong, f"are longer than max_length={limit}"),
            (report.num_empty_mask, f"have an answer with no token in the loss within max_length={limit}"),
            (report.num_equal_sides, "have equal answers"),
        ]
        said = "; ".join(f"{count} {what}" for count, what in reasons if count)
        return f"none of {report.num_rows} rows has anything to learn from: {said} (lengths {report.lengths})"


class PairJob(AnswersJob[PreferenceRow]):
    """Job that turns rows into pairs."""

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
                f"no margin, taken as 0, although other rows have one: {stats.format_examples('missing')}"
            )
        if stats.counts["negative"]:
            named = stats.format_examples("negative")
            report.warnings.append(f"margins below 0, as if the rejected answer were better: {named}")
        return report


class LabelledJob(AnswersJob[LabelledRow]):
    """Job that turns rows into single answers with their labels."""

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
            report.warnings.append(f"all labels are {labels[0]}: there is nothing to tell good from bad by")
        return report


class AnswersRenderer(Protocol):
    """What a reader of answers asks of a Renderer."""

    @property
    def end_token(self) -> str: ...

    @property
    def stop_ids(self) -> list[int]: ...

    @property
    def empty_answers(self) -> set[tuple[int, ...]]: ...

    unused: UnusedColumns

    def note_unused(self, row: Row, read: Collection[str], conversations: Iterable[list[Message]]) -> None: ...

    def segments(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[TemplateSegment]]: ...

    @property
    def format(self) -> ChatFormat: ...

    def describe(self, report: DataReport, form: FormatCounts) -> None: ...

    def warnings(self) -> list[str]: ...


class PreferenceRenderer(Renderer):
    """Writes a prompt and its answers as SFT writes a prompt and a completion."""

    def describe(self, report: DataReport, form: FormatCounts) -> None:
        """Add to the report in what form the rows are learned."""
        hint = "for a chat model give turns, or a system_prompt beside the data's path, which makes turns of them"
        other = unlike_trl(form, apart=True, assistant_only=None)
        describe(report, form, preserves=True, hint=hint, unlike_trl=other)

    def segments(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[TemplateSegment]]:
        """Pieces of the prompt, then of the prompt with each of the answers."""
        texts = [one for one in completions if isinstance(one, str)]
        if isinstance(prompt, str) and len(texts) == len(completions):
            begin = [TemplateSegment(prompt, True)]
            return [begin, *([*begin, TemplateSegment(self.with_eos(text), True, in_loss=True)] for text in texts)]
        before = to_messages(prompt, "user")
        whole = [
            [*asked, *answered]
            for asked, answered in (
                self.format.exchange(before, to_messages(one, "assistant"), where, tools=tools) for one in completions
            )
        ]
        common = 0
        for segments in zip(*whole, strict=False):
            if segments[0].in_loss or any(segment != segments[0] for segment in segments):
                break
            common += 1
        return [whole[0][:common], *whole]


def _after(prompt: TokenizedRow, sequence: TokenizedRow) -> TokenizedRow:
    """What a sequence that begins with the prompt goes on with, up to the last token in the loss."""
    start = len(prompt.token_ids)
    assert sequence.token_ids[:start] == prompt.token_ids
    answer = TokenizedRow(sequence.token_ids[start:], sequence.loss_mask[start:])
    return trim(answer) if True in answer.loss_mask else answer


def _cut(row: _Answers, config: PreferenceConfig) -> _Answers:
    """Cut to `max_prompt_length`, then to `max_length`; what the mode doesn't allow to cut comes back as long as it is.

    With `keep_start` a prompt that fills `max_length` leaves nothing of the answers.
    """
    if config.max_prompt_length is not None:
        row = replace(row, prompt_ids=row.prompt_ids[-config.max_prompt_length :])
    excess = row.length - config.max_length if config.max_length is not None else 0
    if excess <= 0 or config.truncation_mode == "drop":
        return row
    if config.truncation_mode == "keep_end":
        # The answers stay whole and share what is left of the prompt; without any, they would answer nothing.
        return replace(row, prompt_ids=row.prompt_ids[excess:]) if excess < len(row.prompt_ids) else row
    room = max(row.length - excess - len(row.prompt_ids), 0)
    answers = [TokenizedRow(answer.token_ids[:room], answer.loss_mask[:room]) for answer in row.answers]
    return replace(
        row,
        prompt_ids=row.prompt_ids[: config.max_length],
        answers=[trim(answer) if True in answer.loss_mask else answer for answer in answers],
    )
