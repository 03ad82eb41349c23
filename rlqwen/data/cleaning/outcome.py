"""What cleaning found out about rows, apart from the rows: which are dropped and why, which columns change."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlqwen.data.cleaning.texts import Row
from rlqwen.data.views import Overlaid, View

Side = Literal["train", "eval"]


@dataclass(slots=True, frozen=True)
class DroppedRow:
    """A training row that is left out."""

    row: int
    """Number in the data before cleaning, from 0."""
    reason: str
    """The key of the config that dropped it, such as `exact_duplicates`."""
    other_side: Side | None = None
    other_row: int | None = None
    """The row that it is a duplicate of, where there is one."""


@dataclass(slots=True, frozen=True)
class MaskedRow:
    """A row in which something was masked."""

    side: Side
    row: int
    columns: dict[str, Any]
    """The columns that change, with their new values."""
    counts: dict[str, int]
    """Replacements by kind."""


@dataclass(slots=True)
class Outcome:
    """All that cleaning does to the training and eval rows."""

    masked: list[MaskedRow] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)

    def apply(self, rows: Sequence[Row], side: Side) -> Sequence[Row]:
        """The rows with their masks on, none left out."""
        masked = Overlaid(rows, {one.row: one.columns for one in self.masked if one.side == side})
        return masked if isinstance(rows, View) else list(masked)

    def dropped_by_reason(self) -> dict[str, int]:
        """Reason -> number of rows, in the order in which the steps were taken."""
        return dict(Counter(dropped.reason for dropped in self.dropped))

    def masked_by_kind(self, side: Side) -> dict[str, int]:
        """Kind -> number of replacements."""
        total: Counter[str] = Counter()
        for masked in self.masked:
            if masked.side == side:
                total.update(masked.counts)
        return dict(total)

    def survivors(self, num_rows: int) -> Iterator[int]:
        """Numbers of the training rows that stay."""
        gone = {dropped.row for dropped in self.dropped}
        return (number for number in range(num_rows) if number not in gone)
