"""Render SFT rows to template segments, and choose by columns and config what is in the loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlqwen.config.sft import SFTConfig
from rlqwen.data.column_hints import suggest_answer_mapping, suggest_mapping
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import DataReport
from rlqwen.data.format_counts import FormatCounts, count_formats, count_row, describe, unlike_trl
from rlqwen.data.formats import normalize_row
from rlqwen.data.messages import as_text, to_messages
from rlqwen.data.renderer import Renderer
from rlqwen.errors import DataError
from rlqwen.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


class SFTRenderer(Renderer):
    """Render a row by its columns, and mark the loss as the config says."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: SFTConfig) -> None:
        super().__init__(tokenizer, config)
        self._config = config
        self._has_pairs = False

    def render(self, number: int, row: Row) -> list[list[TemplateSegment]]:
        """Return the segments of the one sequence of row `number`; raise DataError if it has nothing to learn."""
        where = f"row {number}"
        row = normalize_row(row, where)
        segments = self._segments(row, where)
        self._record_unused(row)
        return [segments]

    def describe(self, report: DataReport, rows: Sequence[Row]) -> None:
        """Add to the report how the rows are rendered and learned."""
        config = self._config
        counts = count_formats(rows, self._count_format)
        hint = "for a chat model make messages of them: columns: {instruction: question column, output: answer column}"
        other = unlike_trl(counts, apart=self._has_pairs, assistant_only=config.assistant_only_loss)
        describe(report, counts, preserves=config.preserve_thinking, hint=hint, unlike_trl=other)

    def _count_format(self, counts: FormatCounts, row: Row) -> None:
        row = normalize_row(row, "row")
        if "messages" in row:
            counts.count_conversation(self.format, row["messages"], row.get("tools"))
        elif "prompt" in row and "completion" in row:
            self._has_pairs = self._config.completion_only_loss is not False
            count_row(counts, row, [row], lambda: self.format)
        else:
            counts.count_text()

    def _segments(self, row: Row, where: str) -> list[TemplateSegment]:
        text_field = self._config.dataset_text_field
        if "messages" in row:
            return self._conversation(row, where)
        if "prompt" in row and "completion" in row:
            return self._prompt_and_completion(row, where)
        if row.get(text_field) is not None:
            self._refuse_masks("assistant_only_loss", "completion_only_loss", where, "plain text")
            return [TemplateSegment(self.with_eos(as_text(row, text_field, where)), True, in_loss=True)]
        hint = suggest_answer_mapping(row) if "prompt" in row else suggest_mapping(row, "sft")
        raise DataError(
            f"{where}: nothing to learn; rows need 'messages', 'conversations', 'prompt' and 'completion', "
            f"'instruction' and 'output', or {text_field!r}. This one has {', '.join(map(str, row))}: {hint}"
        )

    def _record_unused(self, row: Row) -> None:
        conversations = []
        if "messages" in row:
            read, conversations = {"messages", "tools"}, [row["messages"]]
        elif "prompt" in row and "completion" in row:
            read = {"prompt", "completion"}
            if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
                read.add("tools")
                conversations = [[*to_messages(row["prompt"], "user"), *to_messages(row["completion"], "assistant")]]
        else:
            read = {self._config.dataset_text_field}
        if self._config.eval_generation is not None:
            read.update([self._config.eval_generation.reference or "solution", "answer"])
        self.record_unused(row, read, conversations)

    def _conversation(self, row: Row, where: str) -> list[TemplateSegment]:
        self._refuse_masks("completion_only_loss", None, where, "a whole conversation")
        segments = self.format.conversation(row["messages"], where, tools=row.get("tools"))
        if self._config.assistant_only_loss is not False:
            return segments
        _refuse_excluded_messages(row["messages"], where, "assistant_only_loss")
        return with_all_in_loss(segments)

    def _prompt_and_completion(self, row: Row, where: str) -> list[TemplateSegment]:
        prompt, completion = row["prompt"], row["completion"]
        completion_only = self._config.completion_only_loss is not False
        if isinstance(prompt, str) and isinstance(completion, str):
            self._refuse_masks("assistant_only_loss", None, where, "plain text")
            segments = [TemplateSegment(prompt, True), TemplateSegment(self.with_eos(completion), True, in_loss=True)]
            return segments if completion_only else with_all_in_loss(segments)
        before, after = to_messages(prompt, "user"), to_messages(completion, "assistant")
        if not completion_only and self._config.assistant_only_loss:
            return self.format.conversation([*before, *after], where, tools=row.get("tools"))
        prompt_segments, answer_segments = self.format.exchange(before, after, where, tools=row.get("tools"))
        if completion_only:
            return [*prompt_segments, *answer_segments]
        _refuse_excluded_messages([*before, *after], where, "completion_only_loss")
        return with_all_in_loss([*prompt_segments, *answer_segments])

    def _refuse_masks(self, first: str, second: str | None, where: str, what: str) -> None:
        for key in (first, second):
            if key and getattr(self._config, key):
                raise DataError(f"{where}: {key} is set, but the row is {what}, where it has no effect; leave it out")


def _refuse_excluded_messages(messages: list[Message], where: str, key: str) -> None:
    """Raise DataError if a message other than the assistant's is excluded from the loss, which has no effect here."""
    roles = (message["role"] for message in messages if "in_loss" in message)
    role = next((role for role in roles if role != "assistant"), None)
    if role is not None:
        raise DataError(
            f"{where}: a message of role {role!r} is excluded from the loss, but {key}: false learns all messages "
            "except excluded messages of the assistant; remove one of the two settings"
        )


def with_all_in_loss(segments: list[TemplateSegment]) -> list[TemplateSegment]:
    """Return the segments with all of them in the loss, except messages that the row excludes."""
    return [replace(segment, in_loss=not segment.is_excluded) for segment in segments]
