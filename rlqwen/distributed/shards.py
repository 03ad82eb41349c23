"""Let an optimizer update the part of each sharded weight that this rank holds, as a plain tensor.

So clipping, AdamW and the check of its moments do not know about shards, and what is saved stays in parts.
"""

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlqwen.distributed.fsdp import reshard
from rlqwen.distributed.parameter_group import ParameterGroup


def is_shard(tensor: Any) -> TypeGuard[DTensor]:
    """Return whether this is a tensor of which each rank holds a part."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks, which call this together; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of `like`."""
    return shard_like(tensor, like).to_local() if isinstance(like, DTensor) else tensor


def shard_like(tensor: Tensor, like: DTensor) -> DTensor:
    """Return a whole tensor, which all ranks have, cut as `like` is; nothing is communicated."""
    here = tensor.to(like.to_local().device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


class Shards:
    """Hold the sharded weights of all parameter groups, and the parts of them that this rank updates."""

    def __init__(self) -> None:
        self._weights: dict[int, tuple[nn.Parameter, DTensor]] = {}
        self._modules: list[nn.Module] = []

    def take_over(self, group: ParameterGroup) -> ParameterGroup:
        """Return the group with this rank's parts in the places of sharded weights; they share memory."""
        if group.module is not None:
            self._modules.append(group.module)
        return replace(group, parameters=[self._part_of(weight) for weight in group.parameters])

    def _part_of(self, weight: nn.Parameter) -> nn.Parameter:
        if not isinstance(weight, DTensor):
            return weight
        part = nn.Parameter(weight.to_local().detach())
        self._weights[id(part)] = part, weight
        return part

    def owns(self, parameter: Tensor) -> bool:
        """Return whether a parameter of a group is a part of a sharded weight."""
        return id(parameter) in self._weights

    def take_gradients(self) -> None:
        """Move the gradients, which the backward pass has added up over the ranks, from the weights to their parts."""
        for module in self._modules:
            reshard(module)
        for part, weight in self._weights.values():
            gradient: Any = weight.grad
            part.grad, weight.grad = None if gradient is None else gradient.to_local(), None

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole weight, of which ZeRO-3 too leaves each rank a shard."""
        weight = self._weights[id(parameter)][1] if self.owns(parameter) else parameter
        return tuple(getattr(weight, "ds_shape", weight.shape))

    @property
    def is_empty(self) -> bool:
        return not self._weights

    def sharded(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of a parameter's state as this rank's part of a whole, if the weight is sharded and it has its shape."""
        if not self.owns(parameter) or value.shape != parameter.shape:
            return value
        weight = self._weights[id(parameter)][1]
        layout = (weight.device_mesh, weight.placements)
        return DTensor.from_local(value, *layout, shape=weight.shape, stride=weight.stride(), run_check=False)

    def empty(self, parameter: Tensor | None, like: Tensor) -> Tensor:
        """Return a tensor to read one of a parameter's state into, which has the shape and dtype of `like`."""
        if parameter is None or not self.owns(parameter) or tuple(like.shape) != self.shape(parameter):
            return torch.empty(like.shape, dtype=like.dtype)
        return self.sharded(parameter, torch.empty(parameter.shape, dtype=like.dtype))

    def own_part(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return this rank's part of a tensor of a parameter's state, whole or read in parts."""
        if isinstance(value, DTensor):
            return value.to_local()
        if not self.owns(parameter) or tuple(value.shape) != self.shape(parameter):
            return value
        return own_part(value, self._weights[id(parameter)][1])
