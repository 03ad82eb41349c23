"""The order in which training rows are taken: epochs of seeded permutations, as one endless stream.

A position in the stream is a single number, so going on from it repeats nothing and loses nothing; a batch may span
two epochs.
"""

import random
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
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def progress(self) -> dict[str, int]:
        """How far the stream has come."""
        return {"position": self.position}

    def restore_progress(self, progress: dict[str, int]) -> None:
        """Go on from there."""
        self.position = progress["position"]

    def ended_epoch(self, count: int) -> bool:
        """Whether the last `count` rows taken held the last one of an epoch."""
        return self.position // len(self.rows) > (self.position - count) // len(self.rows)

    def _next(self) -> Row:
        epoch, place = divmod(self.position, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self.rows)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        self.position += 1
        return self.rows[self._order[place]]
