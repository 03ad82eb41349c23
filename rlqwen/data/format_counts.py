"""What form the rows have once they are written: text or turns, with or without thoughts, and what of them is learned.

It is found in some of the rows, evenly spread, because it is a property of the data set and must not cost a second pass.
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

_LOOKED_AT = 256
_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>")
_LINE_BREAK = "the line break after the end of an answer, which is never generated, is not learned"


@dataclass(slots=True)
class FormatCounts:
    """Counts over the rows looked at."""

    num_rows: int = 0
    num_text: int = 0
    """Rows of plain text, which no chat template writes."""
    num_conversations: int = 0
    """Rows of `messages`, all of whose assistant turns are learned."""
    turns: Counter[str] = field(default_factory=Counter)
    """Learned turns: `thinks`; `learned_block`, an empty one; `prompted_block`, which the prompt ends in; `no_block`."""
    num_lost_thoughts: int = 0
    """Learned turns whose thoughts the template leaves out."""

    def note_text(self) -> None:
        self.num_rows += 1
        self.num_text += 1

    def note_conversation(self, chat: ChatFormat, messages: list[Message], tools: Any) -> None:
        self.num_rows += 1
        self.num_conversations += 1
        self._note(chat, chat.conversation(messages, "row", tools=tools), messages)

    def note_answers(self, chat: ChatFormat, prompt: list[Message], answers: list[list[Message]], tools: Any) -> None:
        self.num_rows += 1
        for answer in answers:
            asked, answered = chat.exchange(prompt, answer, "row", tools=tools)
            self._note(chat, [*asked, *answered], answer)

    def _note(self, chat: ChatFormat, segments: list[TemplateSegment], messages: list[Message]) -> None:
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


def count_formats(rows: Sequence[Row], note: Callable[[FormatCounts, Row], None]) -> FormatCounts:
    """Determine the form of some of the rows; `note` reads one row into it. Rows that it refuses are skipped."""
    form = FormatCounts()
    for row in _spread(rows):
        try:
            note(form, row)
        except DataError:
            continue
    return form


def note_row(form: FormatCounts, row: Row, answers: list[Row], chat: Callable[[], ChatFormat]) -> None:
    """Read `prompt` and `completion` of each answer in a row; `chat` is called only if there are turns."""
    prompt, completions = answers[0]["prompt"], [one["completion"] for one in answers]
    if all(isinstance(text, str) for text in (prompt, *completions)):
        form.note_text()
    else:
        turns = [to_messages(completion, "assistant") for completion in completions]
        form.note_answers(chat(), to_messages(prompt, "user"), turns, row.get("tools"))


def describe(
    report: DataReport, form: FormatCounts, *, preserves: bool | None, hint: str, unlike_trl: list[str]
) -> None:
    """Say in the report what the rows train. `hint`: how plain text becomes turns."""
    report.form += _thinking(form) + [f"unlike TRL: {line}" for line in unlike_trl]
    if form.num_text:
        count = "all" if form.num_text == form.num_rows else f"{form.num_text} of {form.num_rows}"
        report.warnings.append(
            f"{count} rows looked at are plain text: they are written WITHOUT the chat template; {hint}"
        )
    if form.num_lost_thoughts and preserves is None:
        report.warnings.append(
            f"the chat template leaves the thoughts of {form.num_lost_thoughts} earlier turns out (in {form.num_rows} rows "
            "looked at), and these turns are learned without; preserve_thinking: true learns every turn with its thoughts"
        )


def unlike_trl(form: FormatCounts, *, apart: bool, assistant_only: bool | None) -> list[str]:
    """Describe what is learned differently from TRL, on purpose; `apart`: prompts have their own answers."""
    lines = []
    if apart and form.num_text:
        lines.append("prompt and answer are tokenized apart, as in generation")
    if form.num_conversations and assistant_only is None:
        lines.append(
            f"of messages only assistant turns are learned (assistant_only_loss: false learns all); {_LINE_BREAK}"
        )
    elif form.num_conversations and assistant_only:
        blocks = "; earlier turns stand as the template writes them (preserve_thinking: true gives each a think block)"
        lines.append(_LINE_BREAK + (blocks if form.turns else ""))
    elif apart and form.num_rows > form.num_text:
        lines.append(_LINE_BREAK)
    return lines


def _thinking(form: FormatCounts) -> list[str]:
    """Return which mode of a thinking model the rows train, if they hold turns without thoughts."""
    total = form.turns.total()
    if form.turns["thinks"] == total:
        return []
    modes = {
        "learned_block": "as the template writes them: the prompt asks for thoughts, and an empty think block is learned "
        "(enable_thinking: false in chat_template_kwargs puts it into the prompt)",
        "prompted_block": "to a prompt that ends in an empty think block (enable_thinking: false), which is not learned",
        "no_block": "without a think block after a prompt that asks for thoughts, as the template writes earlier turns "
        "(preserve_thinking: true writes each as if it were the last)",
    }
    said = "; ".join(f"{form.turns[mode]} {how}" for mode, how in modes.items() if form.turns[mode])
    return [f"{total - form.turns['thinks']} of {total} answers looked at have no thoughts and are learned: {said}"]


def _kind(opening: str, text: str) -> str:
    if _EMPTY_BLOCK.match(opening + text):
        return "prompted_block" if "</think>" in opening else "learned_block"
    return "thinks" if (opening + text).lstrip().startswith("<think>") else "no_block"


def _spread(rows: Sequence[Row]) -> Iterator[Row]:
    count = min(len(rows), _LOOKED_AT)
    return (rows[place * len(rows) // count] for place in range(count))
