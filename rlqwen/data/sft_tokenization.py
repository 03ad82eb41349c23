"""Rows to token ids: sequences with their loss masks for SFT, prompts for GRPO."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlqwen.config.sft import SFTConfig
from rlqwen.data.chat import ChatFormat
from rlqwen.data.data_report import DataReport, percentiles
from rlqwen.data.encoding import SequenceCodec, TokenizedRow, encode, refuse, tokenize_rows, trim
from rlqwen.data.prompts import tokenize_prompts
from rlqwen.data.sft_renderer import SFTRenderer, with_all_in_loss
from rlqwen.data.tokenization import tokenize_all
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob, data_settings
from rlqwen.errors import DataError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

__all__ = ["SFTJob", "tokenize_conversation", "tokenize_prompts", "tokenize_sft"]


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
    """Sequences and loss masks of all rows, in order; rows that are too long or have no loss are left out and counted.

    Conversations are written by the chat template (`config.chat_template_path`, else the tokenizer's). Text, and
    prompts and completions that are text, are taken as they are: special tokens in them act, and the EOS token is
    added at their end; prompt and completion are tokenized apart, as in generation. Raises DataError for a row that
    can't be learned from, and if nothing is left, naming the reason; given a list of `faults`, puts them there instead.
    """
    return tokenize_all(rows, SFTJob(tokenizer, config), faults=faults, num_proc=config.dataset_num_proc)


class SFTJob(TokenizingJob[TokenizedRow]):
    """Job that turns rows into training sequences."""

    codec = SequenceCodec()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig) -> None:
        super().__init__(tokenizer)
        self.config = config

    @cached_property
    def renderer(self) -> SFTRenderer:
        return SFTRenderer(self.tokenizer, self.config)

    def settings(self) -> Any:
        wanted = self.config.eval_generation  # the report names columns that it reads as used
        reads = None if wanted is None else wanted.reference or "solution"
        apart_from = ("packing", "pad_token", "eval_generation")
        return data_settings(self.config, SFTConfig, apart_from) | {"eval_reference": reads}

    def run(
        self, start: int, rows: Sequence[Row], faults: list[DataError] | None
    ) -> tuple[list[TokenizedRow], TokenizationStats]:
        config, renderer, stats = self.config, self.renderer, TokenizationStats(DataReport(num_rows=len(rows)))
        report = stats.report
        kept: list[TokenizedRow] = []
        for number, (row,) in tokenize_rows(start, rows, self.tokenizer, renderer.write, faults):
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
        report.columns, report.message_keys = renderer.unused.take()
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
            f"{report.num_empty_mask} have no token in the loss: no assistant turn, or it lies beyond "
            f"max_length={config.max_length} (lengths {report.lengths})"
        )
    return f"none of {report.num_rows} rows has anything to learn from, so the loss would be 0: {'; '.join(reasons)}"
