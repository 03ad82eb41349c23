"""Hold weights whole while they are read or written, of which ranks hold shards: of FSDP2, ZeRO-3 or AutoTP."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlqwen.distributed import tensor_parallel
from rlqwen.distributed.fsdp import sharded_modules
from rlqwen.distributed.shards import is_shard, own_part, whole


def is_sharded(parameter: Tensor) -> bool:
    """Return whether each rank holds only a shard of the parameter."""
    return is_shard(parameter) or hasattr(parameter, "ds_id")


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
def gathered(modules: Iterable[nn.Module], *, modify: bool = False, trained: bool = False) -> Iterator[None]:
    """Hold the modules' own weights whole inside; all ranks must enter together.

    Args:
        modules: their weights, not those of the modules in them.
        modify: keep what is written into them, which must be the same on all ranks.
        trained: leave out frozen weights.
    """
    modules = list(modules)
    with ExitStack() as stack:
        stack.enter_context(tensor_parallel.whole_weights(modules))
        stack.enter_context(
            gathered_zero3((weight for *_, weight in _weights(modules, trained=trained)), modify=modify)
        )
        stack.enter_context(_gathered_fsdp2(modules, modify=modify, trained=trained))
        yield


def _weights(modules: Iterable[nn.Module], *, trained: bool) -> Iterator[tuple[nn.Module, str, Any]]:
    for module in modules:
        for name, weight in module._parameters.items():
            if weight is not None and (weight.requires_grad or not trained):
                yield module, name, weight


@contextmanager
def _gathered_fsdp2(modules: list[nn.Module], *, modify: bool, trained: bool) -> Iterator[None]:
    held: dict[int, tuple[Any, nn.Parameter]] = {}
    places = [place for place in _weights(modules, trained=trained) if is_shard(place[2])]
    for module, name, weight in places:
        if id(weight) not in held:  # a tied one has two places
            replacement = nn.Parameter(whole(weight.detach()), requires_grad=weight.requires_grad)
            vars(replacement).update(vars(weight))
            held[id(weight)] = weight, replacement
        module._parameters[name] = held[id(weight)][1]
    try:
        yield
        if modify:
            for weight, replacement in held.values():
                weight.to_local().detach().copy_(own_part(replacement.detach(), like=weight))
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


@contextmanager
def gathered_zero3(weights: Iterable[Any], *, modify: bool = False) -> Iterator[None]:
    """Hold weights whole inside that ZeRO-3 shards; `modify` keeps what the main rank writes into them."""
    sharded = {id(weight): weight for weight in weights if hasattr(weight, "ds_id")}
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
    if any(map(is_shard, model.parameters())):
        with _unsharded(model):
            yield
        return
    sharded: Any = next((weight for weight in model.parameters() if hasattr(weight, "ds_id")), None)
    if sharded is None:
        yield
        return
    offload = sharded.sharding.parameter_offload
    with gathered(model.modules()):
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:  # they would shard each layer again
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


@contextmanager
def _unsharded(root: Any) -> Iterator[None]:
    modules = sharded_modules(root)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()
