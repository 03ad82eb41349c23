"""Count how rows are rendered: as text or messages, with or without thoughts, and what is learned.

The counts cover an evenly spaced sample of the rows, to avoid a second pass over the data.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rlqwen.data.chat import ChatFormat
from rlqwen.data.control_tokens import TemplateSegment
from rlqwen.data.data_report import DataReport
from rlqwen.data.messages import to_messages
from rlqwen.data.reasoning import thoughts_of
from rlqwen.errors import DataError
from rlqwen.types import Message

Row = dict[str, Any]

_SAMPLE_SIZE = 256
_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>")
_LINE_BREAK = "the line break after the end of an answer, which is never generated, is not learned"


@dataclass(slots=True)
class FormatCounts:
    """Count rows of the sample by format."""

    num_rows: int = 0
    num_text: int = 0
    """Rows of plain text, which the chat template does not render."""
    num_conversations: int = 0
    """Rows of `messages`, in which all assistant turns are learned."""
    turns: Counter[str] = field(default_factory=Counter)
    """Learned turns by kind: `thinks`, `learned_block` (an empty think block is learned), `prompted_block` (the prompt
    ends in an empty think block) and `no_block`."""
    num_lost_thoughts: int = 0
    """Learned turns whose thoughts the template drops."""

    def count_text(self) -> None:
        """Count a row of plain text."""
        self.num_rows += 1
        self.num_text += 1

    def count_conversation(self, chat: ChatFormat, messages: list[Message], tools: Any) -> None:
        """Count a whole conversation."""
        self.num_rows += 1
        self.num_conversations += 1
        self._count(chat, chat.conversation(messages, "row", tools=tools), messages)

    def count_answers(self, chat: ChatFormat, prompt: list[Message], answers: list[list[Message]], tools: Any) -> None:
        """Count a prompt with one or more answers."""
        self.num_rows += 1
        for answer in answers:
            prompt_segments, answer_segments = chat.exchange(prompt, answer, "row", tools=tools)
            self._count(chat, [*prompt_segments, *answer_segments], answer)

    def _count(self, chat: ChatFormat, segments: list[TemplateSegment], messages: list[Message]) -> None:
        found: Counter[str] = Counter()
        before = ""
        for in_loss, group in groupby(segments, key=lambda segment: segment.in_loss):
            text = "".join(segment.text for segment in group)
            if in_loss and chat.writes_think_blocks:
                opening = chat.template.opening if before.endswith(chat.template.opening) else ""
                found[_kind(opening, text)] += 1
            before = text
        self.turns += found
        thoughts = [thoughts_of(m) for m in messages if m["role"] == "assistant" and m.get("in_loss") is not False]
        self.num_lost_thoughts += max(sum(map(bool, thoughts)) - found["thinks"], 0) if chat.writes_think_blocks else 0


def count_formats(rows: Sequence[Row], count: Callable[[FormatCounts, Row], None]) -> FormatCounts:
    """Count the formats of a sample of rows. `count` adds one row; rows for which it raises DataError are skipped."""
    counts = FormatCounts()
    for row in _sample(rows):
        try:
            count(counts, row)
        except DataError:
            continue
    return counts


def count_row(counts: FormatCounts, row: Row, answers: list[Row], chat: Callable[[], ChatFormat]) -> None:
    """Count the `prompt` and `completion` of each answer of a row; `chat` is called only if there are messages."""
    prompt, completions = answers[0]["prompt"], [one["completion"] for one in answers]
    if all(isinstance(text, str) for text in (prompt, *completions)):
        counts.count_text()
    else:
        messages = [to_messages(completion, "assistant") for completion in completions]
        counts.count_answers(chat(), to_messages(prompt, "user"), messages, row.get("tools"))


def describe(
    report: DataReport, counts: FormatCounts, *, preserves: bool | None, hint: str, unlike_trl: list[str]
) -> None:
    """Add to the report what the rows train. `hint`: how to make messages of plain text."""
    report.form += _thinking(counts) + [f"unlike TRL: {line}" for line in unlike_trl]
    if counts.num_text:
        count = "all" if counts.num_text == counts.num_rows else f"{counts.num_text} of {counts.num_rows}"
        report.warnings.append(
            f"{count} sampled rows are plain text: they are rendered WITHOUT the chat template; {hint}"
        )
    if counts.num_lost_thoughts and preserves is None:
        report.warnings.append(
            f"the chat template drops the thoughts of {counts.num_lost_thoughts} earlier turns (in {counts.num_rows} sampled "
            "rows), and these turns are learned without them; preserve_thinking: true learns all turns with their thoughts"
        )


def unlike_trl(counts: FormatCounts, *, apart: bool, assistant_only: bool | None) -> list[str]:
    """Describe what is intentionally learned differently from TRL; `apart`: rows have a prompt and a completion."""
    lines = []
    if apart and counts.num_text:
        lines.append("prompt and answer are tokenized separately, as in generation")
    if counts.num_conversations and assistant_only is None:
        lines.append(
            f"only assistant turns of messages are learned (assistant_only_loss: false learns all); {_LINE_BREAK}"
        )
    elif counts.num_conversations and assistant_only:
        blocks = "; earlier turns are as the template writes them (preserve_thinking: true gives each a think block)"
        lines.append(_LINE_BREAK + (blocks if counts.turns else ""))
    elif apart and counts.num_rows > counts.num_text:
        lines.append(_LINE_BREAK)
    return lines


def _thinking(counts: FormatCounts) -> list[str]:
    """Return which mode of a thinking model the rows train, if some answers have no thoughts."""
    total = counts.turns.total()
    if counts.turns["thinks"] == total:
        return []
    modes = {
        "learned_block": "with an empty think block, which is learned because the prompt asks for thoughts "
        "(enable_thinking: false in chat_template_kwargs moves it into the prompt)",
        "prompted_block": "after a prompt that ends in an empty think block (enable_thinking: false), which is not learned",
        "no_block": "without a think block after a prompt that asks for thoughts, as the template writes earlier turns "
        "(preserve_thinking: true renders each as if it were the last)",
    }
    details = "; ".join(f"{counts.turns[mode]} {how}" for mode, how in modes.items() if counts.turns[mode])
    return [f"{total - counts.turns['thinks']} of {total} sampled answers have no thoughts and are learned: {details}"]


def _kind(opening: str, text: str) -> str:
    if _EMPTY_BLOCK.match(opening + text):
        return "prompted_block" if "</think>" in opening else "learned_block"
    return "thinks" if (opening + text).lstrip().startswith("<think>") else "no_block"


def _sample(rows: Sequence[Row]) -> Iterator[Row]:
    count = min(len(rows), _SAMPLE_SIZE)
    return (rows[number * len(rows) // count] for number in range(count))
