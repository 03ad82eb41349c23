"""Rows to token ids: sequences with their loss masks for SFT, prompts for GRPO."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.encoding import TokenizedRow, encode, refuse, tokenize_rows, trim
from rlqwen.data.form import RowForm, describe, look_at
from rlqwen.data.formats import normalise_row, to_prompt_row
from rlqwen.data.guard import Piece
from rlqwen.data.report import DataReport, first_of, percentiles
from rlqwen.data.sft import SFTWriter, all_in_loss
from rlqwen.data.unused import Unused
from rlqwen.data.writer import eos_warnings
from rlqwen.errors import DataError
from rlqwen.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def tokenize_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    assistant_only: bool = True,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    preserve_thinking: bool | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of a whole conversation; see rlqwen.data.chat for what is in the loss and why.

    With `assistant_only=False` every token but the first is in the loss. Raises DataError for turns that the template
    drops, ModelError for a template that can't be trained with.
    """
    chat = ChatFormat(
        tokenizer,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        preserve_thinking=preserve_thinking,
    )
    pieces = chat.conversation(messages, "conversation")
    (row,) = encode(tokenizer, [pieces if assistant_only else all_in_loss(pieces)])
    return row.token_ids, row.loss_mask


def tokenize_sft(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: SFTConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[list[TokenizedRow], DataReport]:
    """Sequences and loss masks of all rows, in order; rows that are too long or have no loss are left out and counted.

    Conversations are written by the chat template (`config.chat_template_path`, else the tokenizer's). Text, and
    prompts and completions that are text, are taken as they are: special tokens in them act, and the EOS token is
    added at their end; prompt and completion are tokenised apart, as in generation. Raises DataError for a row that
    can't be learned from, and if nothing is left, naming the reason; given a list of `faults`, puts them there instead.
    """
    report = DataReport(num_rows=len(rows))
    writer = SFTWriter(tokenizer, config)
    kept: list[TokenizedRow] = []
    lengths: list[int] = []
    for number, (row,) in tokenize_rows(rows, tokenizer, writer.write, faults):
        length = len(row.token_ids)
        lengths.append(length)
        is_long = config.max_length is not None and length > config.max_length
        if is_long and config.truncation_mode != "drop":
            row = _truncate(row, config)
        is_dropped = is_long and config.truncation_mode == "drop"
        if is_dropped or True not in row.loss_mask:
            report.note("overlong" if is_dropped else "empty_mask", number)
            report.num_dropped_tokens += length
            continue
        if is_long:
            report.note("truncated", number)
            report.num_cut_tokens += length - len(row.token_ids)
        row = trim(row)
        if row.token_ids[-1] not in writer.stop_ids:
            report.note("no_end", number)
        kept.append(row)
    report.num_kept = len(kept)
    report.lengths = percentiles(lengths)
    report.end_of_turn = writer.end_token
    report.warnings = writer.warnings()
    writer.describe(report, rows)
    report.columns, report.turn_keys = writer.unused.take()
    report.name_unused()
    report.num_tokens = sum(len(row.token_ids) for row in kept)
    report.num_loss_tokens = sum(sum(row.loss_mask) for row in kept)
    if kept:
        report.eos_in_loss = 1 - report.count("no_end") / len(kept)
    elif not faults:
        refuse(DataError(_nothing_to_learn(report, config)), faults)
    return kept, report


def tokenize_prompts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int | None,
    overlong: Literal["drop", "refuse"] = "drop",
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    faults: list[DataError] | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Prompts ready to sample from, with the rows' other columns for the rewards; `index` is the row's number.

    Messages are written by the chat template and end in its generation prompt; text is taken as it is. A prompt of
    more than `max_prompt_length` tokens is dropped and counted, or refused with a DataError that names the rows.
    Given a list of `faults`, errors are put there instead of being raised. Which columns are not used only the caller
    can say, who knows the rewards: `report.name_unused`.
    """
    report = DataReport(num_rows=len(rows))
    found: dict[int, Row] = {}
    unused = Unused()
    opening: set[int] = set()
    chat: ChatFormat | None = None

    def write(number: int, row: Row) -> list[list[Piece]]:
        nonlocal chat
        where = f"row {number}"
        given = normalise_row(row, where)
        row = found[number] = to_prompt_row(given, where)
        if isinstance(row["prompt"], str):
            unused.note_prompt(given, row)
            pieces = [Piece(row["prompt"], True)]
        else:
            chat = chat or ChatFormat(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
            unused.note_prompt(given, row, chat.render)
            pieces = chat.prompt(row["prompt"], where, tools=row.get("tools"))
        if "".join(piece.text for piece in pieces).rstrip().endswith("<think>"):
            opening.add(number)
        return [pieces]

    prompts: list[Prompt] = []
    overlong_rows: list[str] = []
    lengths: list[int] = []
    for number, (tokenized,) in tokenize_rows(rows, tokenizer, write, faults):
        length = len(tokenized.token_ids)
        lengths.append(length)
        row = found.pop(number)
        content = row.pop("prompt")
        if not length:
            refuse(DataError(f"row {number}: the prompt is empty"), faults)
            continue
        if max_prompt_length is not None and length > max_prompt_length:
            overlong_rows.append(f"row {number} has {length}")
            report.note("overlong", number)
            report.num_dropped_tokens += length
            continue
        prompts.append(Prompt(number, tokenized.token_ids, content, row, opens_reasoning=number in opening))
    if overlong_rows and (overlong == "refuse" or not prompts):
        refuse(DataError(_too_long(overlong_rows, len(rows), max_prompt_length)), faults)
    report.num_kept = len(prompts)
    report.num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    report.lengths = percentiles(lengths)
    report.end_of_turn = chat.end_of_turn if chat else tokenizer.eos_token
    report.warnings = eos_warnings(tokenizer, report.end_of_turn)
    report.columns, report.turn_keys = unused.take()
    _describe_prompts(report, rows)
    return prompts, report


def _describe_prompts(report: DataReport, rows: Sequence[Row]) -> None:
    def note(form: RowForm, row: Row) -> None:
        form.num_rows += 1
        form.num_text += isinstance(to_prompt_row(normalise_row(row, "row"), "row")["prompt"], str)

    hint = "for a chat model make them turns, for example by a system_prompt beside the data's path"
    describe(report, look_at(rows, note), preserves=True, hint=hint, unlike_trl=[])


def _truncate(row: TokenizedRow, config: SFTConfig) -> TokenizedRow:
    assert config.max_length is not None
    kept = slice(config.max_length) if config.truncation_mode == "keep_start" else slice(-config.max_length, None)
    return TokenizedRow(row.token_ids[kept], [False, *row.loss_mask[kept][1:]])


def _nothing_to_learn(report: DataReport, config: SFTConfig) -> str:
    reasons = []
    if report.num_overlong:
        reasons.append(f"{report.num_overlong} are longer than max_length={config.max_length} and were dropped")
    if report.num_empty_mask:
        reasons.append(
            f"{report.num_empty_mask} have no token in the loss: no assistant turn, or it lies beyond "
            f"max_length={config.max_length} (lengths {report.lengths})"
        )
    return f"none of {report.num_rows} rows has anything to learn from, so the loss would be 0: {'; '.join(reasons)}"


def _too_long(overlong_rows: list[str], num_rows: int, limit: int | None) -> str:
    return (
        f"{len(overlong_rows)} of {num_rows} prompts are longer than max_prompt_length={limit} tokens: "
        f"{first_of(overlong_rows)}; raise it, or shorten them"
    )
