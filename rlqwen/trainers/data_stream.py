"""Take training rows in order: epochs of seeded permutations, as one endless stream.

A position in the stream is a single number, so a resumed run repeats no row and loses none; a batch may span two epochs.
"""

import random
from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

from rlqwen.errors import DataError

Row = TypeVar("Row")


class RowStream(Generic[Row]):
    """Rows of `rows`, epoch after epoch."""

    def __init__(self, rows: Sequence[Row], *, seed: int, shuffle: bool, position: int = 0) -> None:
        if not rows:
            raise DataError("there are no training rows")
        self.rows = rows
        self.seed = seed
        self.shuffle = shuffle
        self.position = position
        """Rows taken so far."""
        self._orders: dict[int, array[int]] = {}
        """Epoch -> its order, for the current epoch and the next if it was read."""

    @property
    def epoch(self) -> float:
        """Return the number of passes over the rows, including the fraction of the current one."""
        return self.position / len(self.rows)

    def take(self, count: int) -> list[Row]:
        """Return the next `count` rows."""
        rows = self.peek(0, count)
        self.position += count
        return rows

    def peek(self, skip: int, count: int) -> list[Row]:
        """Return the `count` rows after the next `skip`, without taking them."""
        start = self.position + skip
        return [self._row(position) for position in range(start, start + count)]

    def state_dict(self) -> dict[str, int]:
        """Return the number of rows taken."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state saved by `state_dict`."""
        self.position = state["position"]

    def ended_epoch(self, count: int) -> bool:
        """Return whether the last `count` rows taken held the last one of an epoch."""
        return self.position // len(self.rows) > (self.position - count) // len(self.rows)

    def _row(self, position: int) -> Row:
        epoch, place = divmod(position, len(self.rows))
        if epoch not in self._orders:
            order = array("q", range(len(self.rows)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            now = self.position // len(self.rows)
            self._orders = {old: kept for old, kept in self._orders.items() if old >= now} | {epoch: order}
        return self.rows[self._orders[epoch][place]]
