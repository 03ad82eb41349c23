"""Call a model through one module, which an engine that shards weights takes as its root."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlqwen.distributed.fsdp import shard

_ATTRIBUTE = "_rlqwen_root"


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

    @classmethod
    def of(cls, model: nn.Module) -> "Root | None":
        """Return the root through which a model was sharded when it was loaded; None if it was not."""
        return vars(model).get(_ATTRIBUTE)

    @classmethod
    def shard_without_memory(cls, model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """Shard a model whose weights are to be loaded yet; `of` returns its root."""
        root = cls(model)
        root.shard(device=device, dtype=dtype)
        vars(model)[_ATTRIBUTE] = root  # as an attribute it would be a module within the model

    def shard(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Cut the weights among all ranks, one decoder layer after the other, see rlqwen.distributed.fsdp."""
        layers = (module for module in self.modules() if isinstance(module, GradientCheckpointingLayer))
        shard(self, layers, device=device, dtype=dtype)
