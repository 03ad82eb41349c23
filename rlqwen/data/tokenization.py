"""Rows to token ids: sequences with their loss masks for SFT, prompts for GRPO."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat, Piece
from rlqwen.data.formats import normalise_row, to_prompt_row
from rlqwen.data.report import DataReport, percentiles
from rlqwen.data.sft import SFTWriter, all_in_loss, eos_warnings
from rlqwen.errors import DataError
from rlqwen.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

_BATCH = 512
_PROGRESS_AFTER_S = 3.0
_NAMED_ROWS = 5


@dataclass(slots=True)
class TokenizedRow:
    """One training sequence of T tokens."""

    token_ids: list[int]
    loss_mask: list[bool]
    """T values: token t is in the loss, as what is to be predicted. The first never is: nothing comes before it."""


def tokenize_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    assistant_only: bool = True,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids and loss mask of a whole conversation; see rlqwen.data.chat for what is in the loss and why.

    With `assistant_only=False` every token but the first is in the loss. Raises DataError for turns that the template
    drops, ModelError for a template that can't be trained with.
    """
    chat = ChatFormat(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
    pieces = chat.conversation(messages, "conversation")
    (row,) = _encode(tokenizer, [pieces if assistant_only else all_in_loss(pieces)])
    return row.token_ids, row.loss_mask


def tokenize_sft(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: SFTConfig
) -> tuple[list[TokenizedRow], DataReport]:
    """Sequences and loss masks of all rows, in order; rows that are too long or have no loss are left out and counted.

    Conversations are written by the chat template (`config.chat_template_path`, else the tokenizer's). Text, and
    prompts and completions that are text, are taken as they are: special tokens in them act, and the EOS token is
    added at their end; prompt and completion are tokenised apart, as in generation. Raises DataError if nothing is
    left to learn from, naming the reason.
    """
    report = DataReport(num_rows=len(rows))
    writer = SFTWriter(tokenizer, config)
    kept: list[TokenizedRow] = []
    lengths: list[int] = []
    for _, row in _tokenize(rows, tokenizer, writer.pieces):
        lengths.append(len(row.token_ids))
        is_long = config.max_length is not None and len(row.token_ids) > config.max_length
        if is_long and config.truncation_mode == "drop":
            report.num_overlong += 1
            continue
        if is_long:
            row = _truncate(row, config)
        if True not in row.loss_mask:
            report.num_empty_mask += 1
            continue
        report.num_truncated += is_long
        kept.append(_trim(row))
    report.num_kept = len(kept)
    report.lengths = percentiles(lengths)
    report.end_of_turn = writer.end_token
    report.warnings = writer.warnings()
    if not kept:
        raise DataError(_nothing_to_learn(report, config))
    report.num_tokens = sum(len(row.token_ids) for row in kept)
    report.num_loss_tokens = sum(sum(row.loss_mask) for row in kept)
    report.eos_in_loss = sum(row.token_ids[-1] in writer.stop_ids for row in kept) / len(kept)
    return kept, report


def tokenize_prompts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int | None,
    overlong: Literal["drop", "refuse"] = "drop",
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Prompts ready to sample from, with the rows' other columns for the rewards; `index` is the row's number.

    Messages are written by the chat template and end in its generation prompt; text is taken as it is. A prompt of
    more than `max_prompt_length` tokens is dropped and counted, or refused with a DataError that names the rows.
    """
    report = DataReport(num_rows=len(rows))
    found: dict[int, Row] = {}
    chat: ChatFormat | None = None

    def pieces(number: int, row: Row) -> list[Piece]:
        nonlocal chat
        where = f"row {number}"
        row = found[number] = to_prompt_row(normalise_row(row, where), where)
        if isinstance(row["prompt"], str):
            return [Piece(row["prompt"], True)]
        chat = chat or ChatFormat(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
        return chat.prompt(row["prompt"], where, tools=row.get("tools"))

    prompts: list[Prompt] = []
    overlong_rows: list[str] = []
    lengths: list[int] = []
    for number, tokenized in _tokenize(rows, tokenizer, pieces):
        length = len(tokenized.token_ids)
        lengths.append(length)
        row = found.pop(number)
        content = row.pop("prompt")
        if not length:
            raise DataError(f"row {number}: the prompt is empty")
        if max_prompt_length is not None and length > max_prompt_length:
            overlong_rows.append(f"row {number} has {length}")
            continue
        prompts.append(Prompt(index=number, token_ids=tokenized.token_ids, content=content, columns=row))
    if overlong_rows and (overlong == "refuse" or not prompts):
        raise DataError(_too_long(overlong_rows, len(rows), max_prompt_length))
    if not prompts:
        raise DataError("the dataset is empty")
    report.num_kept, report.num_overlong = len(prompts), len(overlong_rows)
    report.num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    report.lengths = percentiles(lengths)
    report.end_of_turn = chat.end_of_turn if chat else tokenizer.eos_token
    report.warnings = eos_warnings(tokenizer, report.end_of_turn)
    return prompts, report


def _tokenize(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", pieces: Callable[[int, Row], list[Piece]]
) -> Iterator[tuple[int, TokenizedRow]]:
    """(row number, its tokens) in order, a batch of rows at a time; a bar appears when it takes long on a terminal."""
    from tqdm import tqdm

    if not rows:
        raise DataError("the dataset is empty")
    with tqdm(total=len(rows), desc="Tokenising", unit="row", delay=_PROGRESS_AFTER_S, disable=None) as bar:
        for start in range(0, len(rows), _BATCH):
            numbers = range(start, min(start + _BATCH, len(rows)))
            batch = [pieces(number, rows[number]) for number in numbers]
            yield from zip(numbers, _encode(tokenizer, batch), strict=True)
            bar.update(len(numbers))


def _encode(tokenizer: "PreTrainedTokenizerBase", batch: list[list[Piece]]) -> list[TokenizedRow]:
    """Tokenise each distinct piece once, control and ordinary text apart, and put the rows together again."""
    ids: dict[tuple[bool, str], list[int]] = {}
    for is_control in (False, True):
        texts = list(dict.fromkeys(p.text for pieces in batch for p in pieces if p.is_control is is_control and p.text))
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
    for pieces in batch:
        row = TokenizedRow([], [])
        for piece in pieces:
            tokens = ids[piece.is_control, piece.text] if piece.text else []
            row.token_ids += tokens
            row.loss_mask += [piece.in_loss] * len(tokens)
        row.loss_mask[:1] = [False] * len(row.loss_mask[:1])
        rows.append(row)
    return rows


def _truncate(row: TokenizedRow, config: SFTConfig) -> TokenizedRow:
    assert config.max_length is not None
    kept = slice(config.max_length) if config.truncation_mode == "keep_start" else slice(-config.max_length, None)
    return TokenizedRow(row.token_ids[kept], [False, *row.loss_mask[kept][1:]])


def _trim(row: TokenizedRow) -> TokenizedRow:
    """Without what follows the last token in the loss: nothing there is learned or read."""
    end = len(row.loss_mask) - row.loss_mask[::-1].index(True)
    return TokenizedRow(row.token_ids[:end], row.loss_mask[:end])


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
    more = f" and {len(overlong_rows) - _NAMED_ROWS} more" if len(overlong_rows) > _NAMED_ROWS else ""
    return (
        f"{len(overlong_rows)} of {num_rows} prompts are longer than max_prompt_length={limit} tokens: "
        f"{', '.join(overlong_rows[:_NAMED_ROWS])}{more}; raise it, or shorten them"
    )
