"""Print rows with their tokens for `rlqwen data show`: tokens in the loss are marked, and special tokens are
visible."""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.text import Text

from rlqwen.data import DataReport, TokenizedRow
from rlqwen.data.data_report import RowIssue
from rlqwen.errors import DataError
from rlqwen.preflight.dataset.check_target import CheckTarget, prepared_rows, unmapped
from rlqwen.preflight.dataset.row_segments import Segment, segment_rows
from rlqwen.reporting.console import TerminalConsole
from rlqwen.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEARNED, _GIVEN, _SPECIAL = "green", "dim", "bold"
_OPEN, _CLOSE = "⟦", "⟧"
_FATES: dict[RowIssue, str] = {
    "overlong": "left out, too long",
    "empty_mask": "left out, no token in the loss",
    "equal_sides": "left out, both answers are equal",
    "truncated": "cut to length",
}
_PLACE = re.compile(r"\Arow 0: ")


def show_rows(target: CheckTarget, part: str, numbers: range, console: TerminalConsole) -> bool:
    """Print these rows of a part, counted from 0; return False if one of them is faulty.

    Tokens in the loss are green, or in ⟦brackets⟧ if there is no color. Raises DataError if there are no such rows.
    """
    selected = list(islice(prepared_rows(target.parts[part]), numbers.start, numbers.stop))
    if not selected:
        raise DataError(f"{target.title}: there is no row {numbers.start} in {part}; rows are counted from 0")
    is_fine = True
    for number, (place, row) in zip(numbers, selected, strict=False):
        faults = [row] if isinstance(row, DataError) else []
        if target.kind == "unmapped" and not isinstance(row, DataError):
            faults = [DataError(unmapped(row))]
        examples: list[list[Segment]] = []
        report = DataReport()
        if not faults and not isinstance(row, DataError):
            examples, report = segment_rows([row], target, faults)
        fates = [_FATES[fate] for fate in report.rows if fate in _FATES]
        title = ", ".join([f"row {number}", target.kind, *fates])
        console.print(Text.assemble((title, "bold"), f"  {place}"), soft_wrap=True)
        for fault in faults if not report.rows else []:
            console.print(
                Text.assemble(("wrong", "bold red"), f"  {_PLACE.sub('', str(fault), count=1)}"), soft_wrap=True
            )
            is_fine = False
        for segment in _merged(examples):
            _show_segment(segment, target.tokenizer, console)
        console.print()
    return is_fine


def _merged(examples: list[list[Segment]]) -> list[Segment]:
    """Return the segments of a row; the shared prompt of two answers only once."""
    return [segment for i, example in enumerate(examples) for segment in example[min(i, 1) :]]


def _show_segment(segment: Segment, tokenizer: "PreTrainedTokenizerBase", console: TerminalConsole) -> None:
    tokens = segment.tokens
    learned = sum(tokens.loss_mask)
    count = f"{len(tokens.token_ids):,} tokens" + (f", {learned:,} in the loss" if learned else "")
    console.print(Text(f"-- {segment.name}: {count}", style="cyan"))
    marks = (_OPEN, _CLOSE) if console.color_system is None else ("", "")
    text = Text()
    for in_loss, runs in groupby(_runs(tokens, tokenizer), key=lambda run: run[1]):
        text.append(marks[0] if in_loss else "")
        for piece, _, is_special in runs:
            text.append(piece, style=f"{_SPECIAL if is_special else ''} {_LEARNED if in_loss else _GIVEN}".strip())
        text.append(marks[1] if in_loss else "")
    console.print(text, soft_wrap=True)


def _runs(row: TokenizedRow, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, in the loss, special) for each run of similar tokens, decoded together because a character may take
    several."""
    special = set(tokenizer.all_special_ids)
    marked = ((token, in_loss, token in special) for token, in_loss in zip(row.token_ids, row.loss_mask, strict=True))
    for (in_loss, is_special), run in groupby(marked, key=lambda one: one[1:]):
        yield printable(str(tokenizer.decode([token for token, *_ in run]))), in_loss, is_special
