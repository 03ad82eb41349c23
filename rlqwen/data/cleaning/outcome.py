"""Hold the outcome of cleaning separately from the rows: dropped rows with reasons, and changed columns."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlqwen.data.cleaning.texts import Row
from rlqwen.data.views import Overlaid, View

Side = Literal["train", "eval"]


@dataclass(slots=True, frozen=True)
class DroppedRow:
    """Hold the number of a dropped training row, and the reason."""

    row: int
    """Row number before cleaning, from 0."""
    reason: str
    """Config key that dropped the row, such as `exact_duplicates`."""
    other_side: Side | None = None
    other_row: int | None = None
    """Number of the row that this row duplicates, if it is a duplicate."""


@dataclass(slots=True, frozen=True)
class MaskedRow:
    """Hold the masked columns of a row."""

    side: Side
    row: int
    columns: dict[str, Any]
    """Changed columns with their new values."""
    counts: dict[str, int]
    """Number of replacements by kind."""


@dataclass(slots=True)
class Outcome:
    """Hold all changes of the training and eval rows."""

    masked: list[MaskedRow] = field(default_factory=list)
    dropped: list[DroppedRow] = field(default_factory=list)

    def apply(self, rows: Sequence[Row], side: Side) -> Sequence[Row]:
        """Return all rows, with their masked columns."""
        masked = Overlaid(rows, {one.row: one.columns for one in self.masked if one.side == side})
        return masked if isinstance(rows, View) else list(masked)

    def dropped_by_reason(self) -> dict[str, int]:
        """Return the number of dropped rows by reason, in the order of the steps."""
        return dict(Counter(dropped.reason for dropped in self.dropped))

    def masked_by_kind(self, side: Side) -> dict[str, int]:
        """Return the number of replacements by kind."""
        total: Counter[str] = Counter()
        for masked in self.masked:
            if masked.side == side:
                total.update(masked.counts)
        return dict(total)

    def survivors(self, num_rows: int) -> Iterator[int]:
        """Return the numbers of the training rows that are kept."""
        dropped = {one.row for one in self.dropped}
        return (number for number in range(num_rows) if number not in dropped)
