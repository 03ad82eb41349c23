"""What became of the rows: counted while tokenizing, printed by `check` and at the start of a run."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rlqwen.data.unused_columns import unused_line

RowIssue = Literal["truncated", "overlong", "empty_mask", "equal_sides", "no_end", "empty_answer"]
"""What may become of a row. `no_end`: kept, but the token that ends generation is not in the loss of all its answers.
`empty_answer`: kept, but nothing but that token is in the loss of one of them."""

NAMED = 5


@dataclass(slots=True)
class DataReport:
    """Counts over one dataset; token counts are of kept rows."""

    num_rows: int = 0
    num_kept: int = 0
    rows: dict[RowIssue, list[int]] = field(default_factory=dict)
    """Numbers of the rows that something became of."""
    num_cut_tokens: int = 0
    """Tokens cut off rows that are kept."""
    num_dropped_tokens: int = 0
    """Tokens of the rows left out."""
    num_tokens: int = 0
    num_loss_tokens: int = 0
    eos_in_loss: float = 0.0
    """Share of kept SFT rows, or answers, whose last token in the loss ends generation; below 1 where rows are cut."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Percentiles of the rows' tokens before any cut, of a pair with its longer answer: p50, p90, p99, max."""
    end_of_turn: str | None = None
    """The token that ends what the model writes; generation must stop at it."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What to know of the rows, though nothing need be wrong with them."""
    form: list[str] = field(default_factory=list)
    """How the rows are written and what of them is learned, a line a fact."""
    columns: dict[str, int] = field(default_factory=dict)
    """Columns that tokenizing did not read -> rows in which they are filled; of prompts, what rewards may take."""
    message_keys: dict[str, int] = field(default_factory=dict)
    """Keys of turns that nothing reads, the chat template neither -> rows that have them."""
    source: str | None = None
    """Where the token ids come from: a file, and whether it was there already, or a stream; None: made in memory."""

    def record(self, fate: RowIssue, number: int) -> None:
        """Count row `number` under what became of it."""
        self.rows.setdefault(fate, []).append(number)

    def count(self, fate: RowIssue) -> int:
        return len(self.rows.get(fate, ()))

    def name_unused(self, taken: Collection[str] | None = ()) -> None:
        """Note unused columns and keys of turns; `taken`: columns that something else reads, None: all."""
        columns = [] if taken is None else [name for name in self.columns if name not in taken]
        line = unused_line(columns, self.message_keys)
        self.notes += [line] if line else []

    @property
    def num_truncated(self) -> int:
        """Rows cut to max_length and kept."""
        return self.count("truncated")

    @property
    def num_overlong(self) -> int:
        """Rows left out because they are too long."""
        return self.count("overlong")

    @property
    def num_empty_mask(self) -> int:
        """Rows left out because no token of them, or of one of their answers, is in the loss."""
        return self.count("empty_mask")

    @property
    def num_equal_sides(self) -> int:
        """Pairs left out because both answers are the same."""
        return self.count("equal_sides")

    def merge(self, other: "DataReport") -> None:
        """Add the counts of the rows that come next; shares and percentiles need all rows and are left out."""
        for count in ("num_rows", "num_kept", "num_cut_tokens", "num_dropped_tokens", "num_tokens", "num_loss_tokens"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for fate, numbers in other.rows.items():
            self.rows.setdefault(fate, []).extend(numbers)
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
        return cls(**values)

    def summary(self) -> str:
        """One line for people."""
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
    """Return the first few, and how many more there are of `count` (None: of these)."""
    count = len(items) if count is None else count
    more = f" and {count - NAMED} more" if count > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles; empty for no lengths."""
    if not lengths:
        return {}
    ordered = np.sort(np.asarray(lengths))
    ranks = {f"p{percent}": -(-len(ordered) * percent // 100) for percent in (50, 90, 99)}
    return {name: int(ordered[rank - 1]) for name, rank in ranks.items()} | {"max": int(ordered[-1])}
