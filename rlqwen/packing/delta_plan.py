"""Order the tokens of a packed row for recurrent layers: halos, chunks, and stages of sequences.

A recurrent layer needs each sequence in order, and a branch after its prefix. There are three orders of the row's
tokens for this, each computed once per row:

- halos: every sequence preceded by the K - 1 tokens that a causal convolution of width K looks back on;
- chunks: every sequence cut into chunks of C tokens, and the chunks sorted by depth. The parent of a chunk is the chunk
  before it, and the parent of a branch's first chunk is its prefix's last one, so that a scan over the depths carries
  every state of the row along and forks it where branches begin;
- stages: whole segments for kernels that take lengths, first those that begin a tree, then those that continue them, and
  so on.

Shapes: T tokens in the row, L places in another order of them, N chunks of C tokens, H heads.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlqwen.packing.row_layout import ROOT, Layout

CHUNK = 32
"""Tokens per chunk. Measured on rows of 2,500 tokens (1 core): 32 takes as long as 16, and 0.6 of 64, whose chunks are
half padding; on long sequences 16 has twice as many steps."""


@dataclass(slots=True)
class Order:
    """Hold another order of the row's tokens, with empty places and places that repeat a token."""

    source_L: Tensor
    """(L,) index in the row of the token at each place; empty places hold 0."""
    home_T: Tensor
    """(T,) the main place of each token, its home; other places that hold the token are copies."""
    empty: Tensor
    """(any,) the places without a token."""
    copy: Tensor
    """(any,) the places that repeat a token which has its home elsewhere."""
    unread: Tensor
    """(any,) `empty` and `copy`: values computed there are dropped."""

    @classmethod
    def of(cls, source: Tensor, num_tokens: int, copy: Tensor | None = None) -> "Order":
        """Make an order from `source`, the row index of each place's token or -1, and `copy`, which places repeat one."""
        empty = source < 0
        copied = torch.zeros_like(empty) if copy is None else copy & ~empty
        own = (~(empty | copied)).nonzero()[:, 0]
        home_T = torch.full((num_tokens,), -1, dtype=torch.long)
        home_T[source[own]] = own
        if len(own) != num_tokens or bool((home_T < 0).any()):
            raise ValueError(f"the sequences of the row hold {len(own)} tokens, and the row has {num_tokens}")
        unread = (empty | copied).nonzero()[:, 0]
        return cls(source.clamp(min=0), home_T, empty.nonzero()[:, 0], copied.nonzero()[:, 0], unread)

    def by_head(self, num_heads: int, chunk: int) -> "Order":
        """Return the order of (T * H) rows, one per head of a token, in which each chunk holds its heads in sequence."""
        head_H = torch.arange(num_heads)

        def places(place: Tensor) -> Tensor:
            chunk_index = torch.div(place, chunk, rounding_mode="floor")[:, None]
            return ((chunk_index * num_heads + head_H) * chunk + (place % chunk)[:, None]).flatten()

        source_NC = self.source_L.view(-1, 1, chunk)
        source_L = (source_NC * num_heads + head_H[:, None]).flatten()
        return Order(source_L, places(self.home_T), *map(places, (self.empty, self.copy, self.unread)))

    def to(self, device: torch.device) -> "Order":
        return Order(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def spread(self, tensor_T: Tensor) -> Tensor:
        """Return the (T, ...) tensor in this order, (L, ...), with zeros in empty places."""
        spread: Tensor = _Spread.apply(tensor_T, self)  # type: ignore[no-untyped-call]
        return spread

    def collect(self, tensor_L: Tensor) -> Tensor:
        """Return the (L, ...) tensor in the order of the row, (T, ...): the value at each token's home."""
        collected: Tensor = _Collect.apply(tensor_L, self)  # type: ignore[no-untyped-call]
        return collected


class _Spread(torch.autograd.Function):
    """Gather, with a gradient that gathers too: adding into the row, as autograd does, takes twice as long."""

    @staticmethod
    def forward(ctx: Any, tensor_T: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return tensor_T.index_select(0, order.source_L).index_fill_(0, order.empty, 0)

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor, None]:
        order = ctx.order
        grad_T = grad_L.index_select(0, order.home_T)
        if len(order.copy):
            grad_T.index_add_(0, order.source_L[order.copy], grad_L.index_select(0, order.copy))
        return grad_T, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor_L: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return tensor_L.index_select(0, order.home_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        order = ctx.order
        return grad_T.index_select(0, order.source_L).index_fill_(0, order.unread, 0), None


@dataclass(slots=True)
class Depth:
    """Hold the chunks at one depth, which are scanned together."""

    start: int
    end: int
    """Chunks `start` to `end` in the order of the chunks."""
    num_parents: int
    """Number of chunks, from the first, that have chunks after them, so that their states are needed."""
    parent: Tensor | None
    """(end - start,) index of each chunk's parent among those of the last depth; None at the first depth."""


@dataclass(slots=True)
class Stage:
    """Hold segments that one call of a kernel processes, one after another."""

    source_L: Tensor
    """(L,) index in the row of their tokens."""
    cu_seqlens: Tensor
    """(segments + 1,) start of each segment, and the end of the last."""
    parent: Tensor | None
    """(segments,) index of the segment in the last stage that each continues; None at the first stage."""


@dataclass(slots=True)
class DeltaPlan:
    """Hold the orders of a packed row that recurrent layers need; each is made when it is first used."""

    layout: Layout
    num_tokens: int
    device: torch.device
    _made: dict[Any, Any] = field(default_factory=dict)

    def halos(self, width: int) -> Order:
        """Return the row with `width` - 1 places before each sequence, which hold the last tokens before it."""
        order: Order = self._once(("halos", width), lambda: _halos(self.layout, self.num_tokens, width).to(self.device))
        return order

    def chunks(self, num_heads: int, chunk: int = CHUNK) -> tuple[Order, list[Depth]]:
        """Return the order of the row's (T * H) heads of tokens in (N, H, C) chunks, and the depths to scan."""
        made: tuple[Order, list[Depth]] = self._once(
            ("chunks", num_heads, chunk), lambda: self._chunks(num_heads, chunk)
        )
        return made

    def stages(self) -> tuple[list[Stage], Tensor]:
        """Return the stages, and (T,) the place of each token of the row in their concatenated outputs."""
        made: tuple[list[Stage], Tensor] = self._once("stages", lambda: _stages(self.layout, self.device))
        return made

    def _chunks(self, num_heads: int, chunk: int) -> tuple[Order, list[Depth]]:
        source_NC, depths = _chunk_tree(self.layout, chunk)
        for depth in depths:
            depth.parent = None if depth.parent is None else depth.parent.to(self.device)
        order = Order.of(source_NC.flatten(), self.num_tokens).by_head(num_heads, chunk)
        return order.to(self.device), depths

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _halos(layout: Layout, num_tokens: int, width: int) -> Order:
    back = width - 1
    sources, copies = [], []
    for segment in layout.segments:
        before = torch.full((back,), -1)
        known = torch.from_numpy(layout.rows(segment.parent, back))
        before[back - len(known) :] = known
        sources += [before, torch.arange(segment.start, segment.end)]
        copies += [torch.ones(back, dtype=torch.bool), torch.zeros(segment.length, dtype=torch.bool)]
    return Order.of(torch.cat(sources), num_tokens, torch.cat(copies))


def _chunk_tree(layout: Layout, chunk: int) -> tuple[Tensor, list[Depth]]:
    """Return the (N, C) token of each place of each chunk, -1 for none, sorted by depth, and the depths."""
    blocks: list[Tensor] = []
    parents: list[int] = []
    depth_of: list[int] = []
    last: dict[int, int] = {ROOT: -1}
    for number, segment in enumerate(layout.segments):
        count = -(-segment.length // chunk)
        block = torch.arange(segment.start, segment.start + count * chunk)
        blocks.append(torch.where(block < segment.end, block, -1).view(count, chunk))
        parent = last[segment.parent]
        for _ in range(count):
            depth_of.append(depth_of[parent] + 1 if parent >= 0 else 0)
            parents.append(parent)
            parent = len(parents) - 1
        last[number] = parent
    has_child = set(parents)
    order = sorted(range(len(parents)), key=lambda number: (depth_of[number], number not in has_child))
    place = {number: position for position, number in enumerate(order)}
    depths: list[Depth] = []
    for level, group in itertools.groupby(order, key=lambda number: depth_of[number]):
        members = list(group)
        start, above = (depths[-1].end, depths[-1].start) if depths else (0, 0)
        parent_index = torch.tensor([place[parents[number]] - above for number in members]) if level else None
        num_parents = sum(number in has_child for number in members)
        depths.append(Depth(start, start + len(members), num_parents, parent_index))
    return torch.cat(blocks)[torch.tensor(order)], depths


def _stages(layout: Layout, device: torch.device) -> tuple[list[Stage], Tensor]:
    stages: list[Stage] = []
    place: dict[int, int] = {}
    for depth in range(max(layout.depths) + 1):
        members = [number for number, its in enumerate(layout.depths) if its == depth]
        segments = [layout.segments[number] for number in members]
        source = torch.cat([torch.arange(segment.start, segment.end) for segment in segments])
        lengths = torch.tensor([0] + [segment.length for segment in segments])
        parent = torch.tensor([place[segment.parent] for segment in segments]).to(device) if depth else None
        stages.append(Stage(source.to(device), lengths.cumsum(0).to(device), parent))
        place = {number: position for position, number in enumerate(members)}
    return stages, torch.argsort(torch.cat([stage.source_L for stage in stages]))
