"""Load of each weight only the part that this rank keeps: the model is sharded before its weights have memory.

transformers reads for a weight that is sharded by then, as its own `distributed_config` shards it, only this rank's rows
from the files, of fused experts too. Here the model is sharded by rlqwen's own function at the same place.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from rlqwen.distributed.shards import is_shard

LOADING_CONFIG = "distributed_config"


class NotInPartsError(Exception):
    """Report that a model cannot be loaded in parts: a rank would have no expert of a fused weight, which transformers
    cannot read."""


class _NoMesh:
    """Stand in for the mesh of transformers, which only its own sharding needs."""

    def get_mesh(self, dims: Any) -> None:
        return None


def _leaves_a_rank_without_experts(weight: Tensor) -> bool:
    if not is_shard(weight) or weight.ndim < 3 or not weight.placements[0].is_shard(0):
        return False
    num_ranks = weight.device_mesh.size()
    return -(-weight.shape[0] // num_ranks) * (num_ranks - 1) >= weight.shape[0]


@contextlib.contextmanager
def loading_in_parts(shard: Callable[[PreTrainedModel], None]) -> Iterator[dict[str, Any]]:
    """Have `from_pretrained` call `shard` on each model inside; yield the argument that it needs for that."""

    def prepare(cls: Any, config: Any, device_map: Any = None) -> tuple[Any, Any, Any]:
        return (None, device_map, None) if config is None else (config, device_map, _NoMesh())

    def distribute(cls: Any, model: PreTrainedModel, config: Any, mesh: Any) -> PreTrainedModel:
        if config is not None:
            del model.config.distributed_config
            shard(model)
            if any(map(_leaves_a_rank_without_experts, model.parameters())):
                raise NotInPartsError
        return model

    own: dict[str, Any] = {"prepare_distribute_model": prepare, "maybe_distribute_model": distribute}
    for name, function in own.items():
        setattr(PreTrainedModel, name, classmethod(function))
    try:
        yield {LOADING_CONFIG: DistributedConfig(fsdp_size=dist.get_world_size())}
    finally:
        for name in own:
            delattr(PreTrainedModel, name)  # what it inherits is there again
