"""Weights that lie in shards on the ranks (ZeRO-3), put together for as long as they are read or written."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether each rank holds but a shard of it."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter | None], *, modify: bool = False) -> Iterator[None]:
    """Whole parameters inside; all ranks must enter together. `modify`: what the main rank writes into them is kept."""
    sharded = {id(p): p for p in parameters if p is not None and is_sharded(p)}
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(sharded.values()), modifier_rank=0 if modify else None):
        yield
