"""Sequences whose items are read or computed when they are asked for, so that data may be larger than memory."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar, overload

Item = TypeVar("Item")
Source = TypeVar("Source")


class View(Sequence[Item]):
    """A sequence of which a part is a view again; equal to any sequence of equal items."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, place: int) -> Item:
        """Return the item at `place`, 0 <= place < len(self)."""

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> "View[Item]": ...
    def __getitem__(self, place: int | slice) -> "Item | View[Item]":
        if isinstance(place, slice):
            return Selected(self, range(*place.indices(len(self))))
        return self.item(range(len(self))[place])  # the range knows negative places, and refuses those outside

    def __iter__(self) -> Iterator[Item]:
        return (self.item(place) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} items>"


class Selected(View[Item]):
    """The items of `rows` at `places`, in that order."""

    def __init__(self, rows: Sequence[Item], places: Sequence[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def item(self, place: int) -> Item:
        return self.rows[self.places[place]]


class Joined(View[Item]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Item]]) -> None:
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, place: int) -> Item:
        number = bisect_right(self._ends, place)
        return self.parts[number][place - (self._ends[number - 1] if number else 0)]


class Mapped(View[Item], Generic[Source, Item]):
    """Results of `function` for each item, computed again on every access."""

    def __init__(self, rows: Sequence[Source], function: Callable[[Source], Item]) -> None:
        self.rows, self.function = rows, function

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> Item:
        return self.function(self.rows[place])


class Overlaid(View[dict[str, Any]]):
    """Rows of which some have other values in some columns: `changes` by row number."""

    def __init__(self, rows: Sequence[dict[str, Any]], changes: Mapping[int, dict[str, Any]]) -> None:
        self.rows, self.changes = rows, changes

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> dict[str, Any]:
        return self.rows[place] | self.changes.get(place, {})


class Batches(View[Sequence[Item]]):
    """`rows` in parts of `size`, the last one perhaps smaller."""

    def __init__(self, rows: Sequence[Item], size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def item(self, place: int) -> Sequence[Item]:
        return self.rows[place * self.size : (place + 1) * self.size]
