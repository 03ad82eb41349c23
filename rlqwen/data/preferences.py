"""Preference rows to token ids: a prompt with a chosen and a rejected answer, or one answer with a label.

Prompt and answers are written as SFT writes them (rlqwen.data.chat): the prompt ends in the generation prompt, and of
an answer the loss covers what the assistant wrote, end-of-turn tokens included. The prompt's tokens are the same for
all answers to it, whatever is cut.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.reward import RewardConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.encoding import TokenizedRow, refuse, tokenize_rows, trim
from rlqwen.data.form import RowForm, describe, look_at, note_row, unlike_trl
from rlqwen.data.formats import normalise_row
from rlqwen.data.guard import Piece
from rlqwen.data.preference_formats import read_columns, to_labelled_rows, to_pair_rows
from rlqwen.data.report import DataReport, Fate, first_of, percentiles
from rlqwen.data.turns import to_turns
from rlqwen.data.unused import Unused
from rlqwen.data.writer import Writer
from rlqwen.errors import DataError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(slots=True)
class PreferenceRow:
    """A prompt and two answers to it; each answer goes on from the prompt's last token."""

    index: int
    """Row number in the dataset, from 0."""
    prompt_ids: list[int]
    """Empty only for texts that have no common beginning; the first token of an answer is then not in the loss."""
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
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[list[PreferenceRow], DataReport]:
    """Pairs of all rows, in order.

    Pairs that are too long, have an answer without a token in the loss, or two equal answers (as they are, or once
    cut) are left out and counted. Raises DataError for a row that is no pair, and if nothing is left; given a list of
    `faults`, puts them there instead.
    """
    return read_pairs(rows, tokenizer, config, PreferenceWriter(tokenizer, config), faults)


def read_pairs(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    writer: "PairWriter",
    faults: list[DataError] | None,
) -> tuple[list[PreferenceRow], DataReport]:
    """As `tokenize_preferences`, with the text that `writer` makes of them."""
    kept, report = _Reader(tokenizer, config, to_pair_rows, writer).read(rows, faults)
    missing = [f"row {one.index}" for one in kept if "margin" not in one.columns[0]]
    if isinstance(config, RewardConfig) and 0 < len(missing) < len(kept):
        report.warnings.append(f"no margin, hence 0, beside rows that have one: {first_of(missing)}")
    negative = [f"row {one.index}" for one in kept if (one.columns[0].get("margin") or 0) < 0]
    if negative:
        report.warnings.append(f"margins below 0, as if the rejected answer were better: {first_of(negative)}")
    pairs = []
    for one in kept:
        chosen, rejected = one.answers
        pairs.append(PreferenceRow(one.index, one.prompt_ids, chosen, rejected, one.columns[0].get("margin")))
    return pairs, report


def tokenize_labelled(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: PreferenceConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[list[LabelledRow], DataReport]:
    """Labelled answers of all rows, in order; a pair gives two. Counts and errors as `tokenize_preferences`."""
    writer = PreferenceWriter(tokenizer, config)
    kept, report = _Reader(tokenizer, config, to_labelled_rows, writer).read(rows, faults)
    labelled = [
        LabelledRow(one.index, one.prompt_ids, answer, columns["label"])
        for one in kept
        for answer, columns in zip(one.answers, one.columns, strict=True)
    ]
    labels = {row.label for row in labelled}
    if len(labels) == 1:
        report.warnings.append(f"all labels are {str(*labels).lower()}: there is nothing to tell good from bad by")
    return labelled, report


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


class _Reader:
    """Tokenises rows of answers, cuts them to length, and counts what is left out and why.

    `split` goes from a normalised row to `prompt` and `completion` of each of its answers.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: PreferenceConfig,
        split: Callable[[Row, str], list[Row]],
        writer: "PairWriter",
    ) -> None:
        self.tokenizer, self.config, self.split, self.writer = tokenizer, config, split, writer
        self.found: dict[int, list[Row]] = {}
        self.reads_margin = isinstance(config, RewardConfig)

    def read(self, rows: Sequence[Row], faults: list[DataError] | None) -> tuple[list[_Answers], DataReport]:
        report = DataReport(num_rows=len(rows))
        kept: list[_Answers] = []
        lengths: list[int] = []
        for number, (prompt, *sequences) in tokenize_rows(rows, self.tokenizer, self._write, faults):
            answers = [_after(prompt, sequence) for sequence in sequences]
            whole = _Answers(number, prompt.token_ids, answers, self.found.pop(number))
            lengths.append(whole.length)
            row = _cut(whole, self.config)
            fate = self._reason_to_leave_out(row)
            if fate is not None:
                report.note(fate, number)
                report.num_dropped_tokens += whole.num_tokens
                continue
            if row.num_tokens < whole.num_tokens:
                report.note("truncated", number)
                report.num_cut_tokens += whole.num_tokens - row.num_tokens
            kept.append(row)
        self._describe(kept, report)
        form = look_at(rows, self._note_form)
        self.writer.describe(report, form)
        report.lengths = percentiles(lengths)
        if not kept and not faults:
            refuse(DataError(self._nothing_left(report)), faults)
        return kept, report

    def _write(self, number: int, row: Row) -> list[list[Piece]]:
        where = f"row {number}"
        row = normalise_row(row, where)
        answers = self.found[number] = self.split(row, where)
        first, completions = answers[0], [one["completion"] for one in answers]
        pieces = self.writer.pieces(first["prompt"], completions, first.get("tools"), where)
        has_turns = any(not isinstance(one, str) for one in (first["prompt"], *completions))
        whole = [[*to_turns(first["prompt"], "user"), *to_turns(one, "assistant")] for one in completions]
        read = read_columns(row, has_turns=has_turns, margin=self.reads_margin)
        self.writer.note_unused(row, read, whole if has_turns else [])
        return pieces

    def _note_form(self, form: RowForm, row: Row) -> None:
        row = normalise_row(row, "row")
        note_row(form, row, self.split(row, "row"), lambda: self.writer.format)

    def _reason_to_leave_out(self, row: _Answers) -> Fate | None:
        if self.config.max_length is not None and row.length > self.config.max_length:
            return "overlong"
        if not all(True in answer.loss_mask for answer in row.answers):
            return "empty_mask"
        if len(row.answers) == 2 and row.answers[0].token_ids == row.answers[1].token_ids:
            return "equal_sides"
        return None

    def _describe(self, kept: list[_Answers], report: DataReport) -> None:
        report.num_kept, report.end_of_turn = len(kept), self.writer.end_token
        answers = [answer for row in kept for answer in row.answers]
        report.num_tokens = sum(row.num_tokens for row in kept)
        report.num_loss_tokens = sum(sum(answer.loss_mask) for answer in answers)
        stop_ids, num_ended = self.writer.stop_ids, 0
        for row in kept:
            ended = [answer.token_ids[-1] in stop_ids for answer in row.answers]
            num_ended += sum(ended)
            if not all(ended):
                report.note("no_end", row.index)
            if any(tuple(answer.token_ids) in self.writer.empty_answers for answer in row.answers):
                report.note("empty_answer", row.index)
        report.eos_in_loss = num_ended / len(answers) if answers else 0.0
        report.warnings = self.writer.warnings()
        report.columns, report.turn_keys = self.writer.unused.take()
        report.name_unused()
        told: tuple[tuple[Fate, str], ...] = (
            ("equal_sides", "pairs whose answers are equal, hence teach nothing, were left out"),
            ("empty_answer", "empty answers, which teach to end the turn at once"),
        )
        for fate, text in told:
            if numbers := report.rows.get(fate):
                report.warnings.append(f"{text}: {first_of([f'row {number}' for number in numbers])}")

    def _nothing_left(self, report: DataReport) -> str:
        limit = self.config.max_length
        reasons = [
            (report.num_overlong, f"are longer than max_length={limit}"),
            (report.num_empty_mask, f"have an answer with no token in the loss within max_length={limit}"),
            (report.num_equal_sides, "have equal answers"),
        ]
        said = "; ".join(f"{count} {what}" for count, what in reasons if count)
        return f"none of {report.num_rows} rows has anything to learn from: {said} (lengths {report.lengths})"


class PairWriter(Protocol):
    """What a reader of answers asks of a Writer."""

    unused: Unused

    @property
    def end_token(self) -> str: ...

    @property
    def stop_ids(self) -> list[int]: ...

    @property
    def empty_answers(self) -> set[tuple[int, ...]]: ...

    def pieces(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[Piece]]: ...

    def note_unused(self, row: Row, read: Collection[str], conversations: Iterable[list[Message]]) -> None: ...

    @property
    def format(self) -> ChatFormat: ...

    def describe(self, report: DataReport, form: RowForm) -> None: ...

    def warnings(self) -> list[str]: ...


class PreferenceWriter(Writer):
    """Writes a prompt and its answers as SFT writes a prompt and a completion."""

    def describe(self, report: DataReport, form: RowForm) -> None:
        """Say in the report in what form the rows are learned."""
        hint = "for a chat model give turns, or a system_prompt beside the data's path, which makes turns of them"
        other = unlike_trl(form, apart=True, assistant_only=None)
        describe(report, form, preserves=True, hint=hint, unlike_trl=other)

    def pieces(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[Piece]]:
        """Pieces of the prompt, then of the prompt with each of the answers."""
        texts = [one for one in completions if isinstance(one, str)]
        if isinstance(prompt, str) and len(texts) == len(completions):
            begin = [Piece(prompt, True)]
            return [begin, *([*begin, Piece(self.with_eos(text), True, in_loss=True)] for text in texts)]
        before = to_turns(prompt, "user")
        whole = [
            [*asked, *answered]
            for asked, answered in (
                self.format.exchange(before, to_turns(one, "assistant"), where, tools=tools) for one in completions
            )
        ]
        common = 0
        for pieces in zip(*whole, strict=False):
            if pieces[0].in_loss or any(piece != pieces[0] for piece in pieces):
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
