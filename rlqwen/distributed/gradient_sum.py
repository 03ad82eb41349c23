"""Add up gradients over ranks in flat buckets: a call for each weight would wait for the network hundreds of times."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 128 * 1024**2
"""Bytes of a bucket, which are needed beside the gradients; a larger gradient is sent as it lies."""


@torch.no_grad()
def add_up_over_ranks(gradients: Sequence[Tensor], group: Any = None) -> None:
    """Replace each gradient by its sum over the ranks of `group`, all of which pass the same shapes in the same order."""
    for bucket in _buckets(gradients):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in order, as many of one dtype and device as fit into a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        fits = size + gradient.nbytes <= BUCKET_BYTES
        if bucket and not (fits and (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
