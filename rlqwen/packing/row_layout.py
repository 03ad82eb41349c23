"""Say where the sequences of a packed row lie, for attention and other layers that mix tokens.

Shapes: T tokens in the row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Span(NamedTuple):
    """The place of a branch and its prefix in the row; an empty prefix has equal ends."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def prefix_length(self) -> int:
        """Return the number of tokens before the branch's own."""
        return self.prefix_end - self.prefix_start

    @property
    def length(self) -> int:
        """Return the number of the branch's own tokens."""
        return self.end - self.start


class Layout:
    """The spans of a packed row, and what layers have computed from them, on the device of the row."""

    def __init__(self, spans: Sequence[Span], device: torch.device | str = "cpu") -> None:
        """Lay out `spans`, one per branch, in the order of the row."""
        self.spans = list(spans)
        self.device = torch.device(device)
        self.computed: dict[str, Any] = {}
        """Values that layers have computed from the spans, by name; see `compute_once`."""
        self.longest = max((span.prefix_length + span.length for span in self.spans), default=0)
        """Tokens of the longest sequence, its prefix included."""
        self.num_tokens = max((max(span) for span in self.spans), default=0)
        """T, the tokens of the row."""

    def to(self, device: torch.device | str) -> "Layout":
        """Return the same layout on `device`; itself if it is there."""
        return self if torch.device(device) == self.device else Layout(self.spans, device)

    def compute_once(self, name: str, compute: Callable[["Layout"], T]) -> T:
        """Return `compute(self)`, which is called the first time only."""
        if name not in self.computed:
            self.computed[name] = compute(self)
        value: T = self.computed[name]
        return value


def sequences_of(spans: Sequence[Span]) -> list[Span]:
    """List the row's runs of tokens: each prefix once, as a span without a prefix, then the branches; no empty ones."""
    prefixes = dict.fromkeys(span[:2] for span in spans if span.prefix_length > 0)
    sequences = [Span(start, start, start, end) for start, end in prefixes]
    return sequences + [span for span in spans if span.length > 0]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`; to a GPU through pinned memory, so that the copy is not waited for."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
