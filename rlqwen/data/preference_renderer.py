"""Render a prompt and its answers into template segments."""

from collections.abc import Collection, Iterable
from typing import Any, Protocol

from rlqwen.data.chat import ChatFormat
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import DataReport
from rlqwen.data.format_counts import FormatCounts, describe, unlike_trl
from rlqwen.data.messages import to_messages
from rlqwen.data.renderer import Renderer
from rlqwen.data.unused_columns import UnusedColumns
from rlqwen.types import Message

Row = dict[str, Any]


class AnswersRenderer(Protocol):
    """Define the renderer that a job for rows of answers needs."""

    @property
    def end_token(self) -> str: ...

    @property
    def stop_ids(self) -> list[int]: ...

    @property
    def empty_answers(self) -> set[tuple[int, ...]]: ...

    unused: UnusedColumns

    def record_unused(self, row: Row, read: Collection[str], conversations: Iterable[list[Message]]) -> None: ...

    def segments(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[TemplateSegment]]: ...

    @property
    def format(self) -> ChatFormat: ...

    def describe(self, report: DataReport, counts: FormatCounts) -> None: ...

    def warnings(self) -> list[str]: ...


class PreferenceRenderer(Renderer):
    """Render a prompt and its answers as SFT renders a prompt and a completion."""

    def describe(self, report: DataReport, counts: FormatCounts) -> None:
        """Add to the report how the rows are rendered."""
        hint = "for a chat model use messages, or set a system_prompt for the data source, which makes messages of text"
        other = unlike_trl(counts, apart=True, assistant_only=None)
        describe(report, counts, preserves=True, hint=hint, unlike_trl=other)

    def segments(
        self, prompt: str | list[Message], completions: list[str | list[Message]], tools: Any, where: str
    ) -> list[list[TemplateSegment]]:
        """Return segments of the prompt, then of the prompt with each answer."""
        texts = [one for one in completions if isinstance(one, str)]
        if isinstance(prompt, str) and len(texts) == len(completions):
            start = [TemplateSegment(prompt, True)]
            return [start, *([*start, TemplateSegment(self.with_eos(text), True, in_loss=True)] for text in texts)]
        before = to_messages(prompt, "user")
        whole = [
            [*prompt_segments, *answer_segments]
            for prompt_segments, answer_segments in (
                self.format.exchange(before, to_messages(one, "assistant"), where, tools=tools) for one in completions
            )
        ]
        common = 0
        for segments in zip(*whole, strict=False):
            if segments[0].in_loss or any(segment != segments[0] for segment in segments):
                break
            common += 1
        return [whole[0][:common], *whole]
