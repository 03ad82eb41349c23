"""Rows to token ids: sequences with their loss masks for SFT, prompts for GRPO."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat, Piece, load_chat_template
from rlqwen.data.formats import normalise_row, to_prompt_row
from rlqwen.data.report import DataReport, percentiles
from rlqwen.errors import ConfigError, DataError, ModelError
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
    (row,) = _encode(tokenizer, [pieces if assistant_only else _all_in_loss(pieces)])
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
    writer = _SFTWriter(tokenizer, config)
    kept: list[TokenizedRow] = []
    lengths: list[int] = []
    num_eos = 0
    for _, row in _tokenize(rows, tokenizer, writer.pieces):
        lengths.append(len(row.token_ids))
        cut = _truncate(row, config)
        if cut is None:
            report.num_overlong += 1
            continue
        if not any(cut.loss_mask):
            report.num_empty_mask += 1
            continue
        report.num_truncated += len(cut.token_ids) < len(row.token_ids)
        kept.append(cut)
        report.num_loss_tokens += sum(cut.loss_mask)
        report.num_tokens += len(cut.token_ids)
        last = max(t for t, in_loss in enumerate(cut.loss_mask) if in_loss)
        num_eos += cut.token_ids[last] in writer.stop_ids
    report.num_kept = len(kept)
    report.lengths = percentiles(lengths)
    report.end_of_turn = writer.end_token
    report.warnings = writer.warnings()
    if not kept:
        raise DataError(_nothing_to_learn(report, config))
    report.eos_in_loss = num_eos / len(kept)
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
    report.warnings = _eos_warnings(tokenizer, report.end_of_turn)
    return prompts, report


class _SFTWriter:
    """Decides by the row's columns and the config what is written and what is in the loss."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._chat: ChatFormat | None = None
        eos = config.eos_token or tokenizer.eos_token
        if eos is None:
            raise ModelError("the tokenizer has no EOS token, so the end of a text can't be learned; set eos_token")
        if eos not in tokenizer.get_vocab():
            raise ConfigError(f"eos_token: {eos!r} is not in the tokenizer's vocabulary")
        self._eos: str = eos

    @property
    def end_token(self) -> str:
        return self._chat.end_of_turn if self._chat else self._eos

    @property
    def stop_ids(self) -> set[int]:
        return {self._tokenizer.convert_tokens_to_ids(token) for token in (self._eos, self.end_token)}

    def warnings(self) -> list[str]:
        return [] if self._config.eos_token else _eos_warnings(self._tokenizer, self.end_token)

    def pieces(self, number: int, row: Row) -> list[Piece]:
        where = f"row {number}"
        row = normalise_row(row, where)
        text_field = self._config.dataset_text_field
        if "messages" in row:
            return self._conversation(row, where)
        if "prompt" in row and "completion" in row:
            return self._prompt_and_completion(row, where)
        if text_field in row:
            self._refuse_masks("assistant_only_loss", "completion_only_loss", where, "plain text")
            return [Piece(self._with_eos(str(row[text_field])), True, in_loss=True)]
        hint = "map one with columns: {completion: ...}" if "prompt" in row else "map them with columns: {...}"
        raise DataError(
            f"{where}: nothing to learn; rows need 'messages', 'conversations', 'prompt' and 'completion', "
            f"'instruction' and 'output', or {text_field!r}. This one has {', '.join(map(str, row))}: {hint}"
        )

    def _conversation(self, row: Row, where: str) -> list[Piece]:
        self._refuse_masks("completion_only_loss", None, where, "a whole conversation")
        pieces = self._format.conversation(row["messages"], where, tools=row.get("tools"))
        return _all_in_loss(pieces) if self._config.assistant_only_loss is False else pieces

    def _prompt_and_completion(self, row: Row, where: str) -> list[Piece]:
        prompt, completion = row["prompt"], row["completion"]
        completion_only = self._config.completion_only_loss is not False
        if isinstance(prompt, str) and isinstance(completion, str):
            self._refuse_masks("assistant_only_loss", None, where, "plain text")
            pieces = [Piece(prompt, True), Piece(self._with_eos(completion), True, in_loss=True)]
            return pieces if completion_only else _all_in_loss(pieces)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        first_trained = len(before) if completion_only else 0
        pieces = self._format.conversation(
            [*before, *after], where, tools=row.get("tools"), first_trained=first_trained
        )
        return pieces if completion_only or self._config.assistant_only_loss else _all_in_loss(pieces)

    @property
    def _format(self) -> ChatFormat:
        if self._chat is None:
            path = self._config.chat_template_path
            self._chat = ChatFormat(
                self._tokenizer,
                chat_template=load_chat_template(path) if path else None,
                chat_template_kwargs=self._config.chat_template_kwargs,
            )
        return self._chat

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _refuse_masks(self, first: str, second: str | None, where: str, what: str) -> None:
        for key in (first, second):
            if key and getattr(self._config, key):
                raise DataError(f"{where}: {key} is set, but the row is {what}, where it means nothing; leave it out")


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


def _all_in_loss(pieces: list[Piece]) -> list[Piece]:
    return [Piece(piece.text, piece.is_control, in_loss=True) for piece in pieces]


def _truncate(row: TokenizedRow, config: SFTConfig) -> TokenizedRow | None:
    """The row cut to `max_length` tokens; None if it is to be dropped instead."""
    limit = config.max_length
    if limit is None or len(row.token_ids) <= limit:
        return row
    if config.truncation_mode == "drop":
        return None
    kept = slice(None, limit) if config.truncation_mode == "keep_start" else slice(-limit, None)
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
    more = f" and {len(overlong_rows) - _NAMED_ROWS} more" if len(overlong_rows) > _NAMED_ROWS else ""
    return (
        f"{len(overlong_rows)} of {num_rows} prompts are longer than max_prompt_length={limit} tokens: "
        f"{', '.join(overlong_rows[:_NAMED_ROWS])}{more}; raise it, or shorten them"
    )


def _eos_warnings(tokenizer: "PreTrainedTokenizerBase", end_token: str | None) -> list[str]:
    if end_token == tokenizer.eos_token:
        return []
    return [
        f"the chat template ends turns with {end_token!r}, but the tokenizer's EOS token is {tokenizer.eos_token!r}: "
        f"generation must stop at {end_token!r} too; set eos_token: {end_token!r}"
    ]
