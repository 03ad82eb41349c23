"""Weights that lie in shards on the ranks (ZeRO-3), put together for as long as they are read or written."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether each rank holds but a shard of it."""
    return hasattr(parameter, "ds_id")


def has_exact(parameter: Tensor) -> bool:
    """Return whether the optimizer keeps a float32 value that is more exact than the model's."""
    return hasattr(parameter, "engine")


def exact_weight(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the most exact weight for a file of `dtype` (None: the most exact of all): the optimizer's float32 weight
    if the model computes with a rounded one, or on the main rank what a frozen one was. Call it on all ranks together."""
    engine = getattr(parameter, "engine", None)
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
    """Whole parameters inside; all ranks must enter together. `modify`: what the main rank writes into them is kept."""
    sharded: dict[int, Any] = {id(p): p for p in parameters if p is not None and is_sharded(p)}
    if not sharded:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if any(parameter.ds_status is ZeroParamStatus.INFLIGHT for parameter in sharded.values()):
        # Fetched ahead for a backward pass that an evaluation does not make.
        next(iter(sharded.values())).sharding.empty_partition_cache()
    with deepspeed.zero.GatheredParameters(list(sharded.values()), modifier_rank=0 if modify else None):
        yield


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """A model of whole weights inside, which a rank may forward as often as it likes without the others."""
    sharded: Any = next((weight for weight in model.parameters() if is_sharded(weight)), None)
    if sharded is None:
        yield
        return
    offload = sharded.sharding.parameter_offload
    with gathered(model.parameters()):
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:  # they would share each layer out again
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
