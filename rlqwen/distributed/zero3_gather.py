"""Gather weights that ranks hold in shards (ZeRO-3) while they are read or written."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether each rank holds only a shard of the parameter."""
    return hasattr(parameter, "ds_id")


def has_exact(parameter: Tensor) -> bool:
    """Return whether the optimizer keeps a float32 value that is more exact than the model's."""
    return hasattr(parameter, "engine")


def exact_weight(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the most exact weight for a file of `dtype` (None: the most exact of all).

    It is the optimizer's float32 weight if the model computes with a rounded one, and on the main rank the original of a
    frozen one. Call it on all ranks together.
    """
    engine = getattr(parameter, "engine", None)  # a ZeRO engine, or MasterWeights
    exact: Tensor | None = getattr(parameter, "exact", None)
    if exact is not None and dtype != parameter.dtype:
        return exact
    if engine is None or dtype == parameter.dtype:
        return parameter
    return engine.master_of(parameter)  # type: ignore[no-any-return]


def keep_exact(parameter: Tensor, value: Tensor) -> None:
    """Give the optimizer, if it keeps one, the float32 value of a weight that the model holds rounded."""
    engine = getattr(parameter, "engine", None)
    if engine is not None:
        engine.set_master(parameter, value)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter | None], *, modify: bool = False) -> Iterator[None]:
    """Hold whole parameters inside; all ranks must enter together. `modify` keeps what the main rank writes into them."""
    sharded: dict[int, Any] = {id(p): p for p in parameters if p is not None and is_sharded(p)}
    if not sharded:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if any(parameter.ds_status is ZeroParamStatus.INFLIGHT for parameter in sharded.values()):
        # DeepSpeed has prefetched it for a backward pass, which an evaluation does not make.
        next(iter(sharded.values())).sharding.empty_partition_cache()
    with deepspeed.zero.GatheredParameters(list(sharded.values()), modifier_rank=0 if modify else None):
        yield


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Hold a model of whole weights inside, which a rank may forward without the others."""
    sharded: Any = next((weight for weight in model.parameters() if is_sharded(weight)), None)
    if sharded is None:
        yield
        return
    offload = sharded.sharding.parameter_offload
    with gathered(model.parameters()):
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:  # they would shard each layer again
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
