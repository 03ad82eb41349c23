"""Call a model through one module, which an engine that shards weights takes as its root."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlqwen.distributed.fsdp import shard


class Root(nn.Module):
    """Wrap a model: everything that reads its weights, the head included, is called through `forward`.

    So an engine that shards weights has gathered them by then.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(*arguments)`."""
        return compute(*arguments)

    def shard(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Cut the weights among all ranks, one decoder layer after the other, see rlqwen.distributed.fsdp."""
        layers = (module for module in self.modules() if isinstance(module, GradientCheckpointingLayer))
        shard(self, layers, device=device, dtype=dtype)
