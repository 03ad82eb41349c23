"""Attend over a packed row in small padded blocks: for any device, dtype and window.

Queries, and for each segment of the row the keys and values of all that it continues and of itself, are gathered into
blocks of segments of similar length, attended to by `scaled_dot_product_attention`, and scattered back. Gradients of a shared prefix add up
through the gather by themselves.

Shapes: T tokens in the row; a block has B segments of at most Q queries and K keys; H heads of width D.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from rlqwen.packing.row_layout import ROOT, Layout, send


@dataclass(slots=True)
class Block:
    """Segments of similar length that share one call of the attention kernel."""

    query_BQ: Tensor
    """(B, Q) row index of each query; padding repeats index 0."""
    key_BK: Tensor
    """(B, K) row index of each key."""
    mask: Tensor | None
    """(B, 1, Q, K) bool, True where a query may look; None: plain causal, keys equal queries."""
    real_R: Tensor
    """(R,) index, in the flattened (B * Q), of the queries that are not padding."""

    def to(self, device: torch.device) -> "Block":
        """Return the same block on another device."""
        mask = None if self.mask is None else send(self.mask, device)
        return Block(send(self.query_BQ, device), send(self.key_BK, device), mask, send(self.real_R, device))


class BlockPlan:
    """The blocks of a layout, on its device."""

    def __init__(self, layout: Layout) -> None:
        """Make blocks of all segments of the row."""
        blocks = [_block(layout, bucket) for bucket in _buckets(layout)]
        row = torch.cat([block.query_BQ.flatten()[block.real_R] for block in blocks])
        position = torch.from_numpy(layout.positions())
        self.blocks = [block.to(layout.device) for block in blocks]
        self.order_T = torch.argsort(row).to(layout.device)
        """(T,) where each token of the row stands in the blocks' real queries, one block after another."""
        self._position_T = position.to(layout.device)
        """(T,) where each token stands in its sequence."""
        self._windowed: dict[int, list[Tensor | None]] = {}

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
        distance = self._position_T[block.query_BQ][:, :, None] - self._position_T[block.key_BK][:, None, :]
        return block.mask & (distance < window)[:, None]


def attend_in_blocks(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    layout: Layout,
    *,
    window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return (T, H, D): each query's attention over its sequence, its prefix included, up to itself.

    Args:
        query_THD: (T, H, D) queries.
        key_TKD: (T, H_kv, D) keys; H is a multiple of H_kv.
        value_TKD: (T, H_kv, D) values.
        window: how many tokens up to itself a query sees; None: all.
        scaling: factor of the scores; None: D ** -0.5.
        dropout: probability with which an attention weight is dropped.
    """
    dtype = query_THD.dtype
    if query_THD.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # The CPU kernel's backward in half precision takes five to seven times that in float32.
        query_THD, key_TKD, value_TKD = query_THD.float(), key_TKD.float(), value_TKD.float()
    plan = layout.compute_once("blocks", BlockPlan)
    grouped = query_THD.shape[1] != key_TKD.shape[1]
    outputs = []
    with _sdpa_kernels(query_THD.device):
        for block, mask in zip(plan.blocks, plan.masks(window), strict=True):
            query, key, value = (
                _gather(query_THD, block.query_BQ),
                _gather(key_TKD, block.key_BK),
                _gather(value_TKD, block.key_BK),
            )
            if grouped and query.is_cuda and mask is not None:
                # With a mask and grouped heads only the math kernel is left, which holds all scores in float32.
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            attended = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1)[block.real_R])
    return torch.cat(outputs)[plan.order_T].to(dtype)


def _sdpa_kernels(device: torch.device) -> "contextlib.AbstractContextManager[None]":
    """Leave out cuDNN's kernels, which take up to seconds to plan for each new shape, and each row has new shapes."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _gather(tensor_T: Tensor, index_BL: Tensor) -> Tensor:
    """Return (B, H, L, D): the rows of a (T, H, D) tensor at (B, L) indices."""
    return tensor_T[index_BL].transpose(1, 2)


def _buckets(layout: Layout) -> list[list[int]]:
    """Group segments whose query counts differ by less than a factor of two, those that begin a tree apart.

    Padding a block to its longest member then at most doubles the work, and the kernel is called a few times only.
    """
    buckets: dict[tuple[bool, int], list[int]] = {}
    for number, segment in enumerate(layout.segments):
        buckets.setdefault((segment.parent != ROOT, segment.length.bit_length()), []).append(number)
    return [buckets[key] for key in sorted(buckets)]


def _block(layout: Layout, numbers: list[int]) -> Block:
    """Make a block of segments that all begin a tree, or all continue others."""
    segments = [layout.segments[number] for number in numbers]
    num_queries = torch.tensor([segment.length for segment in segments])
    start = torch.tensor([segment.start for segment in segments])
    width = int(num_queries.max())
    column = torch.arange(width)
    is_query = column < num_queries[:, None]
    query = torch.where(is_query, start[:, None] + column, 0)
    real = is_query.flatten().nonzero().squeeze(1)
    prefixes = [torch.from_numpy(layout.rows(segment.parent)) for segment in segments]
    if not len(prefixes[0]):
        return Block(query, query, None, real)

    prefix = pad_sequence(prefixes, batch_first=True)
    is_prefix = torch.arange(prefix.shape[1]) < torch.tensor([len(rows) for rows in prefixes])[:, None]
    causal = column[:, None] >= column
    mask = torch.cat(
        [is_prefix[:, None, :].expand(-1, width, -1), causal.expand(len(segments), -1, -1)],
        dim=2,
    )
    return Block(query, torch.cat([prefix, query], dim=1), mask[:, None], real)
