"""Tokenized rows to rows of the batch: one each, or, with packing, as many in one as fit."""

import hashlib
import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from rlqwen.data.arrow_file import ArrowRows
from rlqwen.data.encoding import TokenizedRow
from rlqwen.data.views import View

PackedRow = list[TokenizedRow]
"""Sequences that count as one row of the batch: one, or, with packing, as many as fit `max_length`."""


class PackedRows(View[PackedRow]):
    """PackedRows of rows that stay where they are: `places` in `rows`, of which bin b has those from `ends[b - 1]` to `ends[b]`."""

    def __init__(self, rows: Sequence[TokenizedRow], places: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self.places, self.ends = rows, places, ends

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, place: int) -> PackedRow:
        start = self.ends[place - 1] if place else 0
        return [self.rows[row] for row in self.places[start : self.ends[place]].tolist()]

    @property
    def digest(self) -> str | None:
        """Return a digest of the content; None if the digest of the rows is not known."""
        inner = getattr(self.rows, "digest", None)
        if inner is None:
            return None
        return hashlib.blake2b(inner.encode() + self.places.tobytes() + self.ends.tobytes(), digest_size=16).hexdigest()


def pack_rows(rows: Sequence[TokenizedRow], capacity: int | None) -> Sequence[PackedRow]:
    """Fill bins of up to `capacity` tokens; None: one row per bin."""
    if capacity is not None:
        return pack_best_fit(rows, capacity)
    places = np.arange(len(rows))
    return PackedRows(rows, places, places + 1)


def pack_best_fit(rows: Sequence[TokenizedRow], capacity: int) -> PackedRows:
    """Pack by best-fit decreasing: each row, longest first, goes to the fullest bin that still has room for it.

    PackedRows are not padded and sequences in one never see each other; only the batch size changes its meaning. Rows of the
    same length keep their order; of bins that are equally full, the first is filled.
    """
    lengths = count_tokens_of(rows)
    order = np.argsort(-lengths, kind="stable")
    chosen = np.empty(len(order), dtype=np.int64)
    num_bins = 0
    open_bins: dict[int, list[int]] = {}  # room left -> a heap of bins with it
    rooms: list[int] = []  # those of which there are bins, ascending
    for number, size in enumerate(lengths[order].tolist()):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            bin_number, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[place]
            bin_number = heapq.heappop(open_bins[room])
            if not open_bins[room]:
                del open_bins[room], rooms[place]
        chosen[number] = bin_number
        left = room - size
        if left not in open_bins:
            open_bins[left] = []
            insort(rooms, left)
        heapq.heappush(open_bins[left], bin_number)
    by_bin = np.argsort(chosen, kind="stable")
    return PackedRows(rows, order[by_bin], np.cumsum(np.bincount(chosen, minlength=num_bins)))


def count_tokens_of(rows: Sequence[TokenizedRow]) -> np.ndarray:
    """Return (N,) int64: tokens of each row."""
    if isinstance(rows, ArrowRows):
        pieces = [piece.value_lengths().to_numpy() for piece in rows.column("token_ids")]
        return np.asarray(np.concatenate(pieces), dtype=np.int64)
    return np.array([len(row.token_ids) for row in rows], dtype=np.int64)
