"""Shard a model's weights, gradients and optimizer state among all ranks: PyTorch's FSDP2 (`fully_shard`).

Matrices are cut by rows (fused experts so that every rank has as much, if that is possible), and gathered for one decoder
layer at a time while it is computed, in the forward's dtype. Each rank keeps its float32 rows, and the gradients of all
ranks are added up in float32. Vectors, such as the weights of norms, and heads of one number stay whole on every rank: they
are a ten-thousandth of a model, and compute in float32.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from rlqwen.config import ParallelConfig


def shards_weights(config: ParallelConfig) -> bool:
    """Return whether models of this process are sharded: FSDP2 is asked for, and there are several ranks."""
    return config.engine == "fsdp2" and dist.is_initialized() and dist.get_world_size() > 1


def shard(root: nn.Module, layers: Iterable[nn.Module], *, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the matrices of `root` by this rank's rows, on `device`; call it on every rank, with the same weights.

    Forwards must go through `root`, on all ranks together. The weights may lie on another device before; those without
    memory (on `meta`) stay so, to be loaded.

    Args:
        root: contains the layers; what it holds beside them (embedding, head) is whole from its forward to its backward.
        layers: modules, in the order of the forward, each of which is gathered by itself.
        dtype: of the whole matrices while they are used.
    """
    mesh = _mesh(device)
    kept = {weight for weight in root.parameters() if not _is_cut(weight)}
    marks = {name: dict(vars(weight)) for name, weight in root.named_parameters()}
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layers = list(layers)
    for module in (*layers, root):
        fully_shard(
            module, mesh=mesh, mp_policy=precision, ignored_params=kept, shard_placement_fn=_placement_of_experts
        )
    for weight in kept:
        if not weight.is_meta:
            weight.data = weight.data.to(device)
    for name, weight in root.named_parameters():
        vars(weight).update(marks[name])
    for sharded in sharded_modules(root):
        # Losses are divided by counts over all ranks already. gloo has no other reduction than a sum.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    _prefetch(root, layers)
    root.register_forward_hook(_reshard_without_backward)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules of `model` that are gathered by themselves; none if it is not sharded by `shard`."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a forward has left for a backward pass that has been made, or will not be."""
    for module in sharded_modules(model):
        module.reshard()


def _reshard_without_backward(root: nn.Module, arguments: Any, output: Any) -> None:
    """Cut the weights of the root again, which FSDP2 keeps whole after a forward."""
    if not torch.is_grad_enabled():
        reshard(root)


def _is_cut(weight: nn.Parameter) -> bool:
    return weight.ndim > 1 and weight.shape[0] > 1 and weight.is_floating_point()


def _placement_of_experts(weight: nn.Parameter) -> Shard | None:
    """Return where to cut the experts in one weight so that every rank has as much; None: by rows, as other weights."""
    sizes = enumerate(weight.shape if weight.ndim == 3 else ())
    return next((Shard(dim) for dim, size in sizes if size % dist.get_world_size() == 0), None)


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))


def _prefetch(root: Any, layers: list[Any]) -> None:
    """Gather the next layer while one is computed, in both directions, whatever the host is waiting for meanwhile.

    Every module is told what comes next in the backward pass. The default is what came before in the forward pass, and its
    record includes forwards without a backward pass, which a rank may make without the others: a rank that then gathers a
    layer too many waits for ever.
    """
    order = [root, *layers]
    for before, following in itertools.pairwise(order):
        before.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([before])
    root.set_modules_to_backward_prefetch(layers[-1:])
