"""Say where the sequences of a packed row lie, for attention and other layers that mix tokens.

A row is cut into segments that form trees: a segment continues its parent, as a completion continues its prompt, and the
tokens of a sequence are those of the segments from a root to the segment in which it ends. Trees may have any depth: a
system prompt, its questions, answers to them, and what continues these.

Shapes: T tokens in the row; S sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

ROOT = -1
"""Parent of a segment that begins a tree."""
_NO_ROWS = np.zeros(0, dtype=np.int64)


class Segment(NamedTuple):
    """A run of tokens of the row, and the segment that it continues."""

    start: int
    end: int
    parent: int = ROOT
    """Number of the segment before it in its sequences, or ROOT."""

    @property
    def length(self) -> int:
        """Return the number of its tokens."""
        return self.end - self.start


class Layout:
    """The segments of a packed row, and what layers have computed from them, on the device of the row."""

    def __init__(
        self, segments: Sequence[Segment], leaves: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> None:
        """Lay out `segments` and the sequences that end in `leaves`.

        Args:
            segments: runs of at least one token, which together are the row, in its order; a segment is followed by all
                that continue it, directly or not, before another tree or branch begins.
            leaves: (S,) number of the segment in which each sequence ends; ROOT for a sequence without tokens.
            device: where layers compute.
        """
        self.segments = list(segments)
        self.leaves = list(leaves)
        self.device = torch.device(device)
        self.computed: dict[str, Any] = {}
        """Values that layers have computed from the segments, by name; see `compute_once`."""
        self.depths: list[int] = []
        """Number of segments before each one in its sequences."""
        self.offsets: list[int] = []
        """Number of tokens before each segment in its sequences."""
        for segment in self.segments:
            known = segment.parent != ROOT
            self.depths.append(self.depths[segment.parent] + 1 if known else 0)
            self.offsets.append(self.offsets[segment.parent] + self.segments[segment.parent].length if known else 0)
        self.num_tokens = self.segments[-1].end if self.segments else 0
        """T, the tokens of the row."""
        self.longest = max(
            (before + s.length for before, s in zip(self.offsets, self.segments, strict=True)), default=0
        )
        """Tokens of the longest sequence."""

    def to(self, device: torch.device | str) -> "Layout":
        """Return the same layout on `device`; itself if it is there."""
        return self if torch.device(device) == self.device else Layout(self.segments, self.leaves, device)

    def compute_once(self, name: str, compute: Callable[["Layout"], T]) -> T:
        """Return `compute(self)`, which is called the first time only."""
        if name not in self.computed:
            self.computed[name] = compute(self)
        value: T = self.computed[name]
        return value

    def path(self, number: int, last: int | None = None) -> list[int]:
        """Return the segments from a root to segment `number`; with `last`, those that hold the last so many tokens."""
        path: list[int] = []
        found = 0
        while number != ROOT and (last is None or found < last):
            path.append(number)
            found += self.segments[number].length
            number = self.segments[number].parent
        return path[::-1]

    def rows(self, number: int, last: int | None = None) -> np.ndarray:
        """Return the ascending row indices of the tokens up to the end of segment `number`, or of the `last` so many."""
        parts = [np.arange(self.segments[i].start, self.segments[i].end) for i in self.path(number, last)]
        rows = np.concatenate(parts) if parts else _NO_ROWS
        return rows if last is None else rows[max(len(rows) - last, 0) :]

    def positions(self) -> np.ndarray:
        """Return (T,) the position of each token in its sequences."""
        starts = zip(self.offsets, self.segments, strict=True)
        return np.concatenate([_NO_ROWS, *(np.arange(before, before + s.length) for before, s in starts)])

    def subtree_ends(self) -> list[int]:
        """Return for each segment where in the row the last one ends that continues it, directly or not."""
        ends = [segment.end for segment in self.segments]
        for number in reversed(range(len(ends))):
            parent = self.segments[number].parent
            if parent != ROOT:
                ends[parent] = max(ends[parent], ends[number])
        return ends


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`; to a GPU through pinned memory, so that the copy is not waited for."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
