"""Keep float32 masters of weights that the model holds in bfloat16, without DeepSpeed.

The optimizer updates the masters, and writes them back, rounded, after each update: so updates that are smaller than a
step of bfloat16 add up until they show. Gradients of micro-batches are added up in float32.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from rlqwen.config import TrainerConfig
from rlqwen.distributed.device import compute_dtype
from rlqwen.distributed.parameter_group import ParameterGroup
from rlqwen.errors import ConfigError


class MasterWeights:
    """Hold the masters of all parameter groups."""

    def __init__(self) -> None:
        self._masters: dict[int, nn.Parameter] = {}
        self._weights: list[nn.Parameter] = []

    @property
    def is_empty(self) -> bool:
        return not self._weights

    def take_over(self, group: ParameterGroup) -> ParameterGroup:
        """Round the matrices of a group in place, and return the group with their masters in their places.

        Vectors, such as those of norms, and heads of one number, which compute in float32, stay as they are.
        """
        return replace(group, parameters=[self._master_for(weight) for weight in group.parameters])

    def _master_for(self, weight: nn.Parameter) -> nn.Parameter:
        if weight.ndim < 2 or weight.shape[0] == 1:
            return weight
        master = nn.Parameter(weight.detach().to(torch.float32, copy=True))
        weight.data = weight.data.to(torch.bfloat16)
        weight.register_post_accumulate_grad_hook(self._move_gradient)
        weight.engine = self  # type: ignore[attr-defined]  # see rlqwen.distributed.whole_weights
        self._masters[id(weight)] = master
        self._weights.append(weight)
        return master

    @torch.no_grad()
    def _move_gradient(self, weight: Tensor) -> None:
        """Add the gradient of one backward pass to that of the master."""
        assert weight.grad is not None
        master = self._masters[id(weight)]
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model's weights."""
        if self._weights:
            torch._foreach_copy_(list(self._weights), [self._masters[id(weight)] for weight in self._weights])

    def owns(self, master: Tensor) -> bool:
        """Return whether a parameter of a group is a master, and not a weight of the model."""
        return any(master is own for own in self._masters.values())

    def master_of(self, weight: Tensor) -> Tensor:
        """Return the float32 master of a weight of the model."""
        return self._masters[id(weight)]

    @torch.no_grad()
    def set_master(self, weight: Tensor, value: Tensor) -> None:
        """Replace the master of a weight of the model."""
        self._masters[id(weight)].copy_(value)


def check_bfloat16(args: TrainerConfig, device: torch.device) -> None:
    """Raise ConfigError if the forward pass on `device` is not in bfloat16, for which masters are kept."""
    if compute_dtype(args, device) != torch.bfloat16:
        raise ConfigError(
            f"master_weights=true keeps weights in bfloat16, and the forward pass on this {device.type} is in float32 "
            f"(bf16 is {args.bf16}): set bf16 to true, or leave master_weights out"
        )
