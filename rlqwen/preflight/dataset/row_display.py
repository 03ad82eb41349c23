"""`rlqwen data show`: rows with their tokens, those in the loss set off, special tokens to be seen."""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rlqwen.data import DataReport, TokenizedRow
from rlqwen.data.data_report import Fate
from rlqwen.errors import DataError
from rlqwen.preflight.dataset.subject import Subject, prepared_rows, unmapped
from rlqwen.preflight.dataset.token_stats import Segment, tokenize_subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEARNED, _GIVEN, _SPECIAL = "green", "dim", "bold"
_OPEN, _CLOSE = "⟦", "⟧"
_FATES: dict[Fate, str] = {
    "overlong": "left out, too long",
    "empty_mask": "left out, no token in the loss",
    "equal_sides": "left out, both answers are equal",
    "truncated": "cut to length",
}
_PLACE = re.compile(r"\Arow 0: ")


def show_rows(subject: Subject, part: str, numbers: range, console: Console) -> bool:
    """Print these rows of a part, counted from 0; False if one of them is faulty, DataError if there are none.

    What is in the loss is green, or, without colour, in ⟦brackets⟧.
    """
    selected = list(islice(prepared_rows(subject.parts[part]), numbers.start, numbers.stop))
    if not selected:
        raise DataError(f"{subject.title}: there is no row {numbers.start} in {part}; rows are counted from 0")
    is_fine = True
    for number, (place, row) in zip(numbers, selected, strict=False):
        faults = [row] if isinstance(row, DataError) else []
        if subject.kind == "unmapped" and not isinstance(row, DataError):
            faults = [DataError(unmapped(row))]
        examples: list[list[Segment]] = []
        report = DataReport()
        if not faults and not isinstance(row, DataError):
            examples, report = tokenize_subject([row], subject, faults)
        fates = [_FATES[fate] for fate in report.rows if fate in _FATES]
        title = ", ".join([f"row {number}", subject.kind, *fates])
        console.print(Text.assemble((title, "bold"), f"  {place}"), soft_wrap=True)
        for fault in faults if not report.rows else []:
            console.print(
                Text.assemble(("wrong", "bold red"), f"  {_PLACE.sub('', str(fault), count=1)}"), soft_wrap=True
            )
            is_fine = False
        for segment in _merged(examples):
            _show_segment(segment, subject.tokenizer, console)
        console.print()
    return is_fine


def _merged(examples: list[list[Segment]]) -> list[Segment]:
    """The segments of a row; of two answers to one prompt, the prompt once."""
    return [segment for i, example in enumerate(examples) for segment in example[min(i, 1) :]]


def _show_segment(segment: Segment, tokenizer: "PreTrainedTokenizerBase", console: Console) -> None:
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
    """(text, in the loss, special) of runs of tokens that are alike; decoded together, as a character may be several."""
    special = set(tokenizer.all_special_ids)
    marked = ((token, in_loss, token in special) for token, in_loss in zip(row.token_ids, row.loss_mask, strict=True))
    for (in_loss, is_special), run in groupby(marked, key=lambda one: one[1:]):
        yield str(tokenizer.decode([token for token, *_ in run])), in_loss, is_special
