"""Divide a packed row among ranks: sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509).

Each rank forwards a contiguous slice of the row's tokens. Only attention needs the tokens of other ranks: before it, an
all-to-all turns slices of the row into slices of the heads, and after it back, so that every rank attends over the
whole row with its share of the heads. At the end the values of the targets are gathered: each rank gets all, with
gradients only for its own, so that the ranks' gradients of a loss on all values add up to the whole gradient.

Shapes: T tokens of a rank's slice, W ranks, H query heads and K key-value heads of width D, R places in the row.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rlqwen.errors import ModelError


def check_heads(config: Any, size: int) -> None:
    """Raise ModelError if the model's query heads cannot be divided evenly among `size` ranks."""
    heads = config.get_text_config().num_attention_heads
    if heads % size:
        fitting = [number for number in range(2, heads + 1) if heads % number == 0]
        raise ModelError(
            f"parallel.sequence_parallel_size={size} does not divide the model's {heads} attention heads "
            f"({heads} / {size} is {heads / size:.3g}); it can be {', '.join(map(str, fitting))}"
        )


class SequenceGroup:
    """Connect the ranks that hold one row together; a group of one changes nothing."""

    def __init__(self, group: Any = None) -> None:
        """Take a torch.distributed process group; None: this rank alone."""
        self._group = group
        self.size: int = 1 if group is None else dist.get_world_size(group)
        self.rank: int = 0 if group is None else dist.get_rank(group)

    def check(self, config: Any) -> None:
        """Raise ModelError if the model's query heads cannot be divided evenly."""
        check_heads(config, self.size)

    def cut(self, row_1T: Tensor) -> Tensor:
        """Return this rank's slice of a row (1, any length), padded with zeros to a multiple of the ranks."""
        if self.size == 1:
            return row_1T
        length = -(-row_1T.shape[1] // self.size)
        padded = F.pad(row_1T, (0, length * self.size - row_1T.shape[1]))
        return padded[:, self.rank * length : (self.rank + 1) * length]

    def num_real(self, num_tokens: int) -> int:
        """Return how many tokens of this rank's slice of a row of `num_tokens` are not padding."""
        length = -(-num_tokens // self.size)
        return min(max(num_tokens - self.rank * length, 0), length)

    def own(self, index_R: Tensor, num_tokens: int) -> tuple[Tensor | slice, Tensor]:
        """Return which places `index_R` of a row of `num_tokens` are in this rank's slice, and their places there."""
        if self.size == 1:
            return slice(None), index_R
        length = -(-num_tokens // self.size)
        own = (index_R // length == self.rank).nonzero()[:, 0]
        return own, index_R[own] - self.rank * length

    def whole(self, values: Tensor, own: Tensor | slice, count: int) -> Tensor:
        """Return the (count,) values of all ranks; those of this rank, at the places `own`, keep their gradient."""
        if isinstance(own, slice):
            return values
        known = values.detach().new_zeros(count).index_copy(0, own, values.detach())
        dist.all_reduce(known, group=self._group)
        return known.index_copy(0, own, values)

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, with the gradient of this rank's own values."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total, group=self._group)
        return values + (total - values.detach())

    def to_heads(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange this slice with all heads for the whole row with this rank's heads: (W T, H / W, D), for all three.

        Key-value heads that cannot be divided evenly among the ranks are repeated for the query heads that share them.
        """
        num_heads, num_kv = query_THD.shape[1], key_TKD.shape[1]
        if num_kv % self.size:
            copies = self.size // num_kv if self.size % num_kv == 0 else num_heads // num_kv
            key_TKD, value_TKD = (x.repeat_interleave(copies, dim=1) for x in (key_TKD, value_TKD))
        parts = [x.unflatten(1, (self.size, -1)) for x in (query_THD, key_TKD, value_TKD)]
        mixed = _AllToAll.apply(torch.cat(parts, dim=2).transpose(0, 1), self._group)  # type: ignore[no-untyped-call]
        query, key, value = mixed.flatten(0, 1).split([part.shape[2] for part in parts], dim=1)
        return query, key, value

    def to_slice(self, attended: Tensor) -> Tensor:
        """Exchange (at most W T, H / W, D) for this rank's slice with all heads, (T, H, D)."""
        length = -(-attended.shape[0] // self.size)
        padded = F.pad(attended, (0, 0, 0, 0, 0, length * self.size - attended.shape[0]))
        mixed: Tensor = _AllToAll.apply(padded.unflatten(0, (self.size, -1)), self._group)  # type: ignore[no-untyped-call]
        return mixed.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Send part w of (W, ...) to rank w; gradients are sent back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]
