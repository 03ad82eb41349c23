"""Attention over a packed row of shared prefixes and their branches.

Any transformers model runs it: `AttentionInterface` swaps the attention function, and the layout travels as a keyword
of the model's forward. Queries, and for each branch the keys and values of its prefix and itself, are gathered into
small padded blocks, attended to by `scaled_dot_product_attention`, and scattered back. Gradients of a shared prefix
add up through the gather by themselves.

Shapes: T tokens in the row; a block has B sequences of at most Q queries and K keys; H heads of width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rlqwen.packing.attention_rules import read_call, read_mask, refusal
from rlqwen.packing.sequence_parallel import SequenceGroup

PACKED_ATTENTION = "rlqwen_packed"


class Span(NamedTuple):
    """Where a branch and its prefix lie in the row; an empty prefix has equal ends."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int


@dataclass(slots=True)
class Block:
    """Sequences of similar length that share one call of the attention kernel."""

    query_BQ: Tensor
    """(B, Q) row index of each query; padding repeats index 0."""
    key_BK: Tensor
    """(B, K) row index of each key."""
    mask: Tensor | None
    """(B, 1, Q, K) bool, True where a query may look; None: plain causal, keys equal queries."""
    real_R: Tensor
    """(R,) index, in the flattened (B * Q), of the queries that are not padding."""

    def to(self, device: torch.device | str) -> "Block":
        mask = None if self.mask is None else self.mask.to(device)
        return Block(self.query_BQ.to(device), self.key_BK.to(device), mask, self.real_R.to(device))


@dataclass(slots=True)
class Layout:
    """Everything attention needs to know of a packed row."""

    blocks: list[Block]
    order_T: Tensor
    """(T,) where each token of the row stands in the blocks' real queries, one block after another."""
    spans: list[Span]
    """A span a branch, in the order of the row."""
    position_T: Tensor
    """(T,) where each token stands in its sequence."""
    _windowed: dict[int, list[Tensor | None]] = field(default_factory=dict, repr=False)
    """Masks of the blocks by the width of the window that they were made for."""
    computed: dict[str, Any] = field(default_factory=dict)
    """What layers other than attention have worked out of the spans, on their device."""

    @classmethod
    def build(cls, spans: Sequence[Span]) -> "Layout":
        """Blocks for the prefixes, each once, and for the branches."""
        spans = list(spans)
        sequences = sequences_of(spans)
        blocks = [_block(bucket) for bucket in _buckets(sequences)]
        row = torch.cat([block.query_BQ.flatten()[block.real_R] for block in blocks])
        position = torch.zeros(len(row), dtype=torch.long)
        for span in sequences:
            first = span.prefix_end - span.prefix_start
            position[span.start : span.end] = torch.arange(first, first + span.end - span.start)
        return cls(blocks, torch.argsort(row), spans, position)

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on another device."""
        blocks = [block.to(device) for block in self.blocks]
        return Layout(blocks, self.order_T.to(device), self.spans, self.position_T.to(device))

    def masks(self, window: int | None) -> list[Tensor | None]:
        """Return each block's mask where a query sees `window` tokens up to itself, or all (None); see Block.mask."""
        if window is None:
            return [block.mask for block in self.blocks]
        if window not in self._windowed:
            self._windowed[window] = [self._windowed_mask(block, window) for block in self.blocks]
        return self._windowed[window]

    def _windowed_mask(self, block: Block, window: int) -> Tensor | None:
        if block.key_BK.shape[1] <= window:
            return block.mask
        if block.mask is None:
            column = torch.arange(block.key_BK.shape[1], device=block.key_BK.device)
            distance = column[:, None] - column
            return ((distance >= 0) & (distance < window))[None, None]
        distance = self.position_T[block.query_BQ][:, :, None] - self.position_T[block.key_BK][:, None, :]
        return block.mask & (distance < window)[:, None]


def sequences_of(spans: Sequence[Span]) -> list[Span]:
    """List the row's runs of tokens: each prefix once, as a span without a prefix, then the branches; no empty ones."""
    prefixes = dict.fromkeys(span[:2] for span in spans if span.prefix_end > span.prefix_start)
    sequences = [Span(start, start, start, end) for start, end in prefixes]
    return sequences + [span for span in spans if span.end > span.start]


def _buckets(sequences: Sequence[Span]) -> list[list[Span]]:
    """Group sequences whose query counts differ by less than a factor of two, plain ones apart from prefixed ones.

    Padding a block to its longest member then at most doubles the work, and the kernel is called a few times only.
    """
    buckets: dict[tuple[bool, int], list[Span]] = {}
    for span in sequences:
        prefixed = span.prefix_end > span.prefix_start
        buckets.setdefault((prefixed, (span.end - span.start).bit_length()), []).append(span)
    return [buckets[key] for key in sorted(buckets)]


def _block(spans: list[Span]) -> Block:
    num_queries = torch.tensor([span.end - span.start for span in spans])
    num_prefix = torch.tensor([span.prefix_end - span.prefix_start for span in spans])
    start = torch.tensor([span.start for span in spans])
    prefix_start = torch.tensor([span.prefix_start for span in spans])
    width, prefix_width = int(num_queries.max()), int(num_prefix.max())

    column = torch.arange(width)
    is_query = column < num_queries[:, None]
    query = torch.where(is_query, start[:, None] + column, 0)
    real = is_query.flatten().nonzero().squeeze(1)
    if prefix_width == 0:
        return Block(query, query, None, real)

    prefix_column = torch.arange(prefix_width)
    is_prefix = prefix_column < num_prefix[:, None]
    prefix = torch.where(is_prefix, prefix_start[:, None] + prefix_column, 0)
    causal = column[:, None] >= column
    mask = torch.cat(
        [is_prefix[:, None, :].expand(-1, width, -1), causal.expand(len(spans), -1, -1)],
        dim=2,
    )
    return Block(query, torch.cat([prefix, query], dim=1), mask[:, None], real)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sequence: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; query (1, H, T, D), key and value (1, H_kv, T, D).

    With a `sequence` group, T is this rank's slice of the row, and the layout is the whole row's. Returns (1, T, H, D).
    Raises ValueError without a layout: the model was called outside rlqwen's packed forward; ModelError for attention
    that is more than causal or windowed, see rlqwen.packing.attention_rules.
    """
    if layout is None:
        raise ValueError(f"the attention {PACKED_ATTENTION!r} needs `layout`: call the model through Policy")
    masks = layout.masks(read_call(module, attention_mask, kwargs).window)
    query_T, key_T, value_T = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequence is not None:
        if value_T.shape[2] != query_T.shape[2]:
            raise refusal("parallel.sequence_parallel_size: the model", "has values narrower than its keys")
        query_T, key_T, value_T = sequence.to_heads(query_T, key_T, value_T)
    grouped = query_T.shape[1] != key_T.shape[1]
    outputs = []
    for block, mask in zip(layout.blocks, masks, strict=True):
        attended = F.scaled_dot_product_attention(
            _gather(query_T, block.query_BQ),
            _gather(key_T, block.key_BK),
            _gather(value_T, block.key_BK),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1)[block.real_R])
    attended_T = torch.cat(outputs)[layout.order_T]
    return (attended_T if sequence is None else sequence.to_slice(attended_T))[None], None


def _gather(tensor_T: Tensor, index_BL: Tensor) -> Tensor:
    """(T, H, D) and (B, L) to (B, H, L, D)."""
    return tensor_T[index_BL].transpose(1, 2)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, read_mask)
