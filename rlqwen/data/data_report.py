"""Report on the rows of a dataset: counted during tokenization, printed by `check` and at the start of a run."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rlqwen.data.unused_columns import unused_line

DropReason = Literal["overlong", "empty_mask", "equal_sides"]
"""Why a row is dropped: too long, no token of a sequence in the loss, or a pair with equal answers."""

RowIssue = DropReason | Literal["truncated", "no_end", "empty_answer"]
"""A drop reason, or an issue of a kept row. `no_end`: the token that ends generation is not in the loss of all answers.
`empty_answer`: the loss of an answer covers only that token."""

MAX_EXAMPLES = 5
"""Largest number of rows that a message lists."""


@dataclass(slots=True)
class DataReport:
    """Count rows and tokens of one dataset; token counts cover kept rows."""

    num_rows: int = 0
    num_kept: int = 0
    rows: dict[RowIssue, list[int]] = field(default_factory=dict)
    """Row numbers by issue."""
    num_cut_tokens: int = 0
    """Tokens that truncation removed from kept rows."""
    num_dropped_tokens: int = 0
    """Tokens of dropped rows."""
    num_tokens: int = 0
    num_loss_tokens: int = 0
    eos_in_loss: float = 0.0
    """Fraction of kept SFT rows, or answers, whose last token in the loss ends generation; below 1 after truncation."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of tokens per row before truncation (p50, p90, p99, max); a pair counts with its longer answer."""
    end_of_turn: str | None = None
    """Token that ends an answer; generation must stop at it."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Information about the rows that need not be a problem."""
    form: list[str] = field(default_factory=list)
    """How the rows are rendered and which text is learned, one fact per line."""
    columns: dict[str, int] = field(default_factory=dict)
    """Columns that tokenization did not read -> number of rows that fill them; rewards may read those of prompts."""
    message_keys: dict[str, int] = field(default_factory=dict)
    """Keys of messages that neither tokenization nor the chat template reads -> number of rows that have them."""
    source: str | None = None
    """Origin of the token ids: a new file, a cached file or a stream; None if they are in memory."""

    def record(self, issue: RowIssue, number: int) -> None:
        """Add row `number` to the rows with this issue."""
        self.rows.setdefault(issue, []).append(number)

    def count(self, issue: RowIssue) -> int:
        """Return the number of rows with this issue."""
        return len(self.rows.get(issue, ()))

    def name_unused(self, used: Collection[str] | None = ()) -> None:
        """Add a note on unused columns and message keys; `used`: columns that something else reads, None: all."""
        columns = [] if used is None else [name for name in self.columns if name not in used]
        line = unused_line(columns, self.message_keys)
        self.notes += [line] if line else []

    @property
    def num_truncated(self) -> int:
        """Number of rows truncated to max_length and kept."""
        return self.count("truncated")

    @property
    def num_overlong(self) -> int:
        """Number of rows dropped because they are too long."""
        return self.count("overlong")

    @property
    def num_empty_mask(self) -> int:
        """Number of rows dropped because the row, or one of its answers, has no token in the loss."""
        return self.count("empty_mask")

    @property
    def num_equal_sides(self) -> int:
        """Number of pairs dropped because both answers are equal."""
        return self.count("equal_sides")

    def merge(self, other: "DataReport") -> None:
        """Add the counts of the rows that come next; fractions and percentiles need all rows and are not merged."""
        for count in ("num_rows", "num_kept", "num_cut_tokens", "num_dropped_tokens", "num_tokens", "num_loss_tokens"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for issue, numbers in other.rows.items():
            self.rows.setdefault(issue, []).extend(numbers)
        for mine, theirs in ((self.columns, other.columns), (self.message_keys, other.message_keys)):
            for name, number in theirs.items():
                mine[name] = mine.get(name, 0) + number
        self.warnings += [warning for warning in other.warnings if warning not in self.warnings]
        self.notes += [note for note in other.notes if note not in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON values; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """Build a report from the values of `to_dict`."""
        return cls(**values)

    def summary(self) -> str:
        """Return the report as one line of text."""
        parts = [f"{self.num_kept} of {self.num_rows} rows", f"{self.num_tokens} tokens"]
        if self.num_loss_tokens:
            parts.append(f"{self.num_loss_tokens} in the loss")
            parts.append(f"EOS in the loss of {self.eos_in_loss:.0%}")
        parts += [f"{count} {what}" for what, count in self._losses() if count]
        return ", ".join([*parts, "lengths " + " ".join(f"{name} {value}" for name, value in self.lengths.items())])

    def _losses(self) -> list[tuple[str, int]]:
        return [
            ("truncated", self.num_truncated),
            ("over-long and dropped", self.num_overlong),
            ("dropped for an empty loss mask", self.num_empty_mask),
            ("dropped for equal answers", self.num_equal_sides),
        ]


def format_examples(items: Sequence[str], count: int | None = None) -> str:
    """Join the first few items, and say how many more there are of `count` (default: `len(items)`)."""
    count = len(items) if count is None else count
    more = f" and {count - MAX_EXAMPLES} more" if count > MAX_EXAMPLES else ""
    return ", ".join(items[:MAX_EXAMPLES]) + more


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Compute nearest-rank percentiles; return an empty dict for no lengths."""
    if not lengths:
        return {}
    ordered = np.sort(np.asarray(lengths))
    ranks = {f"p{percent}": -(-len(ordered) * percent // 100) for percent in (50, 90, 99)}
    return {name: int(ordered[rank - 1]) for name, rank in ranks.items()} | {"max": int(ordered[-1])}
