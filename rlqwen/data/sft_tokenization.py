"""Tokenize SFT rows to sequences with loss masks."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.data_report import DataReport, percentiles
from rlqwen.data.encoding import SequenceCodec, TokenizedRow, encode, refuse, tokenize_rows, trim
from rlqwen.data.sft_renderer import SFTRenderer, with_all_in_loss
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob, data_settings
from rlqwen.errors import DataError
from rlqwen.types import Message

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
    """Return token ids and loss mask of a whole conversation; rlqwen.data.chat explains what is in the loss and why.

    With `assistant_only=False` every token except the first is in the loss. Raises DataError for messages that the
    template drops, and ModelError for a template that training cannot use.
    """
    chat = ChatFormat(
        tokenizer,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        preserve_thinking=preserve_thinking,
    )
    segments = chat.conversation(messages, "conversation")
    (row,) = encode(tokenizer, [segments if assistant_only else with_all_in_loss(segments)])
    return row.token_ids, row.loss_mask


def tokenize_sft(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    config: SFTConfig,
    *,
    faults: list[DataError] | None = None,
) -> tuple[Sequence[TokenizedRow], DataReport]:
    """Tokenize rows to sequences with loss masks, in order; rows that are too long or have no loss are dropped.

    Conversations are rendered by the chat template (`config.chat_template_path`, else the tokenizer's). Plain text,
    also of prompts and completions, is not changed: special tokens in it act as tokens, and EOS is appended. Prompt and
    completion are tokenized separately, as in generation. Raises DataError for a row that has nothing to learn, and if
    no row is left. With a list `faults`, errors are appended to it instead.
    """
    return tokenize_all(rows, SFTJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


class SFTJob(TokenizingJob[TokenizedRow]):
    """Tokenize rows to training sequences."""

    codec = SequenceCodec()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig) -> None:
        super().__init__(tokenizer)
        self.config = config

    @cached_property
    def renderer(self) -> SFTRenderer:
        return SFTRenderer(self.tokenizer, self.config)

    def settings(self) -> Any:
        evaluation = self.config.eval_generation  # the report counts the column that it reads as used
        reference = None if evaluation is None else evaluation.reference or "solution"
        excluded = ("packing", "pad_token", "eval_generation")
        return data_settings(self.config, SFTConfig, excluded) | {"eval_reference": reference}

    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[TokenizedRow], TokenizationStats]:
        config, renderer, stats = self.config, self.renderer, TokenizationStats(DataReport(num_rows=len(rows)))
        report = stats.report
        kept: list[TokenizedRow] = []
        for number, (row,) in tokenize_rows(start, rows, self.tokenizer, renderer.render, faults):
            length = len(row.token_ids)
            stats.lengths.append(length)
            is_long = config.max_length is not None and length > config.max_length
            if is_long and config.truncation_mode != "drop":
                row = _truncate(row, config)
            is_dropped = is_long and config.truncation_mode == "drop"
            if is_dropped or True not in row.loss_mask:
                report.record("overlong" if is_dropped else "empty_mask", number)
                report.num_dropped_tokens += length
                continue
            if is_long:
                report.record("truncated", number)
                report.num_cut_tokens += length - len(row.token_ids)
            row = trim(row)
            if row.token_ids[-1] not in renderer.stop_ids:
                report.record("no_end", number)
            kept.append(row)
        report.num_kept = len(kept)
        report.num_tokens = sum(len(row.token_ids) for row in kept)
        report.num_loss_tokens = sum(sum(row.loss_mask) for row in kept)
        report.warnings = renderer.warnings()
        report.columns, report.message_keys = renderer.unused.pop_counts()
        stats.end_tokens = [renderer.end_token]
        return kept, stats

    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        self.renderer.describe(report, rows)

    def finish(self, stats: TokenizationStats, faults: list[DataError] | None) -> DataReport:
        report = stats.report
        report.lengths = percentiles(stats.lengths)
        report.end_of_turn = stats.end_of_turn(self.config.eos_token or self.tokenizer.eos_token)
        report.name_unused()
        if report.num_kept:
            report.eos_in_loss = 1 - report.count("no_end") / report.num_kept
        elif not faults:
            refuse(DataError(_nothing_to_learn(report, self.config)), faults)
        return report


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
            f"{report.num_empty_mask} have no token in the loss: no assistant turn, or all of it is after "
            f"max_length={config.max_length} (lengths {report.lengths})"
        )
    return f"none of {report.num_rows} rows has anything to learn from, so the loss would be 0: {'; '.join(reasons)}"
