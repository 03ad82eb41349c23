"""Make training items from a stream of rows as they are needed; takes the place of RowStream.

Rows are read and tokenized a window at a time. A position in the stream is the place of its window and the number of
items taken from it, so a resumed run reads the same rows again, and no item is repeated or lost.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from rlqwen.checkpoint.fingerprint import digest_rows
from rlqwen.data import DataReport
from rlqwen.data.data_report import percentiles
from rlqwen.data.streams import StreamedRows
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob
from rlqwen.errors import DataError

Item = TypeVar("Item")
Make = Callable[[int, list[dict[str, Any]]], tuple[Sequence[Item], TokenizationStats]]

WINDOW = 512
"""Rows that are tokenized at a time; with packing, rows that are packed together."""


@dataclass(slots=True)
class _Window(Generic[Item]):
    epoch: int
    start: int
    """Number of its first row within the epoch."""
    items: Sequence[Item]


class ItemStream(Generic[Item]):
    """Items of a stream, epoch after epoch; `make(start, rows)` makes the items of a window of rows, and counts."""

    def __init__(self, rows: StreamedRows, make: Make[Item]) -> None:
        self._rows, self._make = rows, make
        self._stats = TokenizationStats()
        self._windows: deque[_Window[Item]] = deque()
        self._reader: Iterator[dict[str, Any]] | None = None
        self._next = (0, 0)
        """Epoch and row number at which the next window begins."""
        self._taken = 0
        """Items of the first window that are taken."""
        self._found = False
        """Whether this pass over the stream has given an item."""

    @property
    def epoch(self) -> float:
        """Return the number of completed passes over the stream."""
        return float(self._windows[0].epoch if self._windows else self._next[0])

    @property
    def digest(self) -> str:
        """Return a digest of the data, made from the items of the first window."""
        return f"a stream that begins with {digest_rows(ItemStream(self._rows, self._make)._first_window())}"

    def take(self, count: int) -> list[Item]:
        """Return the next `count` items."""
        items = self.peek(0, count)
        self._taken += count
        while self._windows and self._taken >= len(self._windows[0].items):
            self._taken -= len(self._windows.popleft().items)
        return items

    def peek(self, skip: int, count: int) -> list[Item]:
        """Return the `count` items after the next `skip`, without taking them."""
        start = self._taken + skip
        while sum(len(window.items) for window in self._windows) < start + count:
            self._windows.append(self._read_window())
        items = (item for window in self._windows for item in window.items)
        return list(islice(items, start, start + count))

    def ended_epoch(self, count: int) -> bool:
        """Return False: the end of a stream is known only after it is reached."""
        return False

    def state_dict(self) -> dict[str, int]:
        """Return how far the stream has come."""
        epoch, row = (self._windows[0].epoch, self._windows[0].start) if self._windows else self._next
        return {"epoch": epoch, "row": row, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position saved by `state_dict`."""
        self._windows.clear()
        self._reader = None
        self._next = state["epoch"], state["row"]
        self._taken = state["taken"]

    def summary(self) -> str:
        """Return a summary of what became of all rows read; rows of later passes are counted again."""
        report = self._stats.report
        report.lengths = percentiles(self._stats.lengths)
        report.eos_in_loss = 1 - report.count("no_end") / max(report.num_kept, 1)
        return report.summary()

    def _first_window(self) -> Sequence[Item]:
        return self._read_window().items

    def _read_window(self) -> _Window[Item]:
        epoch, start = self._next
        if self._reader is None:
            self._reader = self._rows.read(epoch, start)
            self._found = start > 0
        rows = list(islice(self._reader, WINDOW))
        items: Sequence[Item] = []
        if rows:
            items, stats = self._make(start, rows)
            self._stats.add(stats)
        self._found |= len(items) > 0
        self._next = epoch, start + len(rows)
        if len(rows) < WINDOW:
            self._reader, self._next = None, (epoch + 1, 0)
            if not self._found:
                raise DataError(f"{self._rows.name}: none of its {start + len(rows)} rows has anything to learn from")
        return _Window(epoch, start, items)


def describe_first(rows: StreamedRows, job: TokenizingJob[Any]) -> DataReport:
    """Report what becomes of the first rows of a stream; raise an error if they are faulty."""
    first = rows.first(WINDOW)
    _, stats = job.run(0, first, None)
    job.describe(stats.report, first)
    report = job.finish(stats, None)
    report.source = (
        f"a stream, read and tokenized as training goes, in its own order; this is of its first {report.num_rows} rows"
    )
    return report
