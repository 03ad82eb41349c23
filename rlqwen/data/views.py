"""Define sequences whose items are read or computed on access, so that data may be larger than memory."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar, overload

Item = TypeVar("Item")
Source = TypeVar("Source")


class View(Sequence[Item]):
    """Define a lazy sequence; a slice is a view again, and a view equals any sequence of equal items."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int) -> Item:
        """Return the item at `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "View[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | View[Item]":
        if isinstance(index, slice):
            return Selected(self, range(*index.indices(len(self))))
        return self.item(range(len(self))[index])  # the range resolves negative indices and raises IndexError

    def __iter__(self) -> Iterator[Item]:
        return (self.item(index) for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} items>"


class Selected(View[Item]):
    """View the items of `rows` at `indices`, in this order."""

    def __init__(self, rows: Sequence[Item], indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> Item:
        return self.rows[self.indices[index]]


class Joined(View[Item]):
    """Concatenate several sequences."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, index: int) -> Item:
        number = bisect_right(self._ends, index)
        return self.parts[number][index - (self._ends[number - 1] if number else 0)]


class Mapped(View[Item], Generic[Source, Item]):
    """View the results of `function` for each item; they are computed again on every access."""

    def __init__(self, rows: Sequence[Source], function: Callable[[Source], Item]) -> None:
        self.rows, self.function = rows, function

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Item:
        return self.function(self.rows[index])


class Overlaid(View[dict[str, Any]]):
    """View rows with changed columns: `changes` maps row numbers to new values."""

    def __init__(self, rows: Sequence[dict[str, Any]], changes: Mapping[int, dict[str, Any]]) -> None:
        self.rows, self.changes = rows, changes

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> dict[str, Any]:
        return self.rows[index] | self.changes.get(index, {})


class Batches(View[Sequence[Item]]):
    """View `rows` in batches of `size`; the last batch may be smaller."""

    def __init__(self, rows: Sequence[Item], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def item(self, index: int) -> Sequence[Item]:
        return self.rows[index * self.size : (index + 1) * self.size]
