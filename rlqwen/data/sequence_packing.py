"""Pack tokenized rows into rows of the batch: one sequence per row, or as many as fit."""

import hashlib
import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from rlqwen.data.arrow_file import ArrowRows
from rlqwen.data.encoding import TokenizedRow
from rlqwen.data.views import View

PackedRow = list[TokenizedRow]
"""Sequences that count as one row of the batch: one sequence, or with packing as many as fit `max_length`."""


class PackedRows(View[PackedRow]):
    """View `rows` as packed rows: packed row b holds the rows `indices[ends[b - 1] : ends[b]]`."""

    def __init__(self, rows: Sequence[TokenizedRow], indices: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self.indices, self.ends = rows, indices, ends

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, index: int) -> PackedRow:
        start = self.ends[index - 1] if index else 0
        return [self.rows[row] for row in self.indices[start : self.ends[index]].tolist()]

    @property
    def digest(self) -> str | None:
        """Return a digest of the content; None if the digest of the rows is not known."""
        inner = getattr(self.rows, "digest", None)
        if inner is None:
            return None
        return hashlib.blake2b(
            inner.encode() + self.indices.tobytes() + self.ends.tobytes(), digest_size=16
        ).hexdigest()


def pack_rows(rows: Sequence[TokenizedRow], capacity: int | None) -> Sequence[PackedRow]:
    """Pack rows into packed rows of up to `capacity` tokens; None: one row per packed row."""
    if capacity is not None:
        return pack_best_fit(rows, capacity)
    indices = np.arange(len(rows))
    return PackedRows(rows, indices, indices + 1)


def pack_best_fit(rows: Sequence[TokenizedRow], capacity: int) -> PackedRows:
    """Pack by best-fit decreasing: each row, longest first, goes to the fullest bin that still has room for it.

    Bins are not padded, and sequences of a bin do not attend to each other; only the meaning of the batch size changes.
    Rows of equal length keep their order; among equally full bins, the first one is used.
    """
    lengths = count_tokens_per_row(rows)
    order = np.argsort(-lengths, kind="stable")
    chosen = np.empty(len(order), dtype=np.int64)
    num_bins = 0
    open_bins: dict[int, list[int]] = {}  # room -> heap of the bins with this room
    rooms: list[int] = []  # keys of `open_bins`, ascending
    for number, size in enumerate(lengths[order].tolist()):
        index = bisect_left(rooms, size)
        if index == len(rooms):
            bin_number, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[index]
            bin_number = heapq.heappop(open_bins[room])
            if not open_bins[room]:
                del open_bins[room], rooms[index]
        chosen[number] = bin_number
        left = room - size
        if left not in open_bins:
            open_bins[left] = []
            insort(rooms, left)
        heapq.heappush(open_bins[left], bin_number)
    by_bin = np.argsort(chosen, kind="stable")
    return PackedRows(rows, order[by_bin], np.cumsum(np.bincount(chosen, minlength=num_bins)))


def count_tokens_per_row(rows: Sequence[TokenizedRow]) -> np.ndarray:
    """Return (N,) int64: number of tokens per row."""
    if isinstance(rows, ArrowRows):
        lengths = [chunk.value_lengths().to_numpy() for chunk in rows.column("token_ids")]
        return np.asarray(np.concatenate(lengths), dtype=np.int64)
    return np.array([len(row.token_ids) for row in rows], dtype=np.int64)
