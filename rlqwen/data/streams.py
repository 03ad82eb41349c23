"""Read rows from a stream: a datasets.IterableDataset, or a source that is read row by row."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from rlqwen.data.plain_values import without_filling
from rlqwen.errors import DataError

Row = dict[str, Any]


class StreamedRows:
    """Read a stream of rows any number of times.

    `begin(epoch)` returns the rows of one pass, in the same order for the same epoch; `prepare(number, row)` normalizes
    one row.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[int], Iterator[Any]],
        prepare: Callable[[int, Any], Row] = lambda number, row: row,
    ) -> None:
        self.name, self._begin, self._prepare = name, begin, prepare

    def read(self, epoch: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a pass from number `start` on; earlier rows are skipped without preparing them."""
        rows = islice(self._begin(epoch), start, None)
        return (self._prepare(number, row) for number, row in enumerate(rows, start))

    def first(self, count: int) -> list[Row]:
        """Return the first rows, to check their format; raise DataError if there are none."""
        rows = list(islice(self.read(0), count))
        if not rows:
            raise DataError(f"{self.name} holds no rows")
        return rows


def as_stream(data: Any) -> StreamedRows | None:
    """Return a dataset as a stream; None if it is not a stream."""
    if isinstance(data, StreamedRows):
        return data
    if hasattr(data, "__len__") or not (hasattr(data, "__iter__") and hasattr(data, "set_epoch")):
        return None

    def begin(epoch: int) -> Iterator[Any]:
        data.set_epoch(epoch)  # a shuffled stream gets a new order
        return iter(data)

    schema = data.features.arrow_schema if getattr(data, "features", None) else None
    return StreamedRows("the stream", begin, lambda number, row: without_filling(dict(row), schema))
