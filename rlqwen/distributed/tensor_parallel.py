"""Shard a model's layers among ranks, one shard of each matrix per rank: DeepSpeed's AutoTP, in training.

transformers' plan says which matrices are cut by rows and which by columns; embeddings and heads stay whole, because
logprobs are computed in chunks from the head's weight. `whole_weights` gathers the weights while they are copied.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rlqwen.errors import ModelError

_NAME = "parallel.autotp_size"


def shard_layers(model: PreTrainedModel, size: int) -> None:
    """Replace each layer's matrices in `model` by this rank's shards; call it on every rank, with the same weights.

    Groups of `size` neighboring ranks share one model. Raises ModelError for a model that cannot be sharded.
    """
    if size == 1:
        return
    check_shardable(model, size)
    with _quiet_import():
        import deepspeed
        from deepspeed.module_inject.auto_tp import AutoTP
        from deepspeed.module_inject.autotp_config import AutoTPConfig
        from deepspeed.module_inject.layers import configure_tensor_parallel_runtime, set_autotp_mode
        from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
        from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
        from deepspeed.utils import groups

    # DeepSpeed causes this warning at every forward of a layer whose output it gathers.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    # DeepSpeed would compile it at the first start, under a lock; if that run is killed, the next waits for it forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    set_autotp_mode(training=True)
    configure_tensor_parallel_runtime(TPTrainingConfig(autotp_size=size))
    plan = AutoTPConfig(tp_size=size, layer_specs=TPPlanConverter.convert(dict(model.config.base_model_tp_plan or {})))
    sharding = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=plan,
        vocab_parallel_lm_head=False,
        model_config=model.config,
        tp_grain_size=1,
        training_mode=True,
    )
    sharding.set_tensor_parallel_config(size, groups.get_tensor_model_parallel_group())
    sharding.update_linear_policies()
    sharding._replace_module(model)
    sharding.register_replicated_grad_hooks(model)
    vars(model)["ds_autotp_parsed"] = True  # so that deepspeed.initialize does not shard it again


def check_shardable(model: Any, size: int) -> None:
    """Raise ModelError, with the numbers, if the layers cannot be divided evenly among `size` ranks."""
    if isinstance(model, PeftModel):
        raise ModelError(f"{_NAME}={size} shards plain weights only: leave the adapter out, or use ZeRO to save memory")
    config = model.config.get_text_config()
    if getattr(config, "num_experts", None):
        raise ModelError(
            f"{_NAME}={size}: DeepSpeed's AutoTP has no plan for fused experts ({type(model).__name__}); leave it at 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, name)
        if count % size:
            raise ModelError(
                f"{_NAME}={size} does not divide the model's {name}={count} ({count} / {size} is {count / size:.3g}); "
                f"it must divide all of num_attention_heads={config.num_attention_heads}, "
                f"num_key_value_heads={config.num_key_value_heads} and intermediate_size={config.intermediate_size}"
            )
    if not getattr(model.config, "base_model_tp_plan", None):
        raise ModelError(f"{_NAME}={size}: transformers has no tensor-parallel plan for {type(model).__name__}")


def is_shard(parameter: nn.Parameter) -> bool:
    """Return whether this is a shard, so that other ranks hold the rest of the matrix."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


@contextlib.contextmanager
def whole_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the modules' own weights whole inside; all ranks must enter together.

    Values written into them inside are kept, in shards, if all ranks write the same.
    """
    held: list[list[Any]] = [
        [each.weight, each.bias] for each in modules if any(map(is_shard, each.parameters(recurse=False)))
    ]
    for weights in held:
        weights[0].gather_params(weights)
    try:
        yield
    finally:
        for weights in held:
            weights[0]._tp_partition(weights)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Silence DeepSpeed's warnings on import about what it does not find on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
