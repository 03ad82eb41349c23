"""Keep the float32 weights of a half-precision checkpoint, such as decay rates (A_log) of delta-net layers, in float32.

transformers rounds them to the checkpoint's dtype when it loads it. Here they are taken from the files again, and stay
float32 in the forward, in every folder that is written, and on their way to the rollout workers.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from rlqwen.distributed.shards import is_shard, shard_like
from rlqwen.models.hub import StoredTensor, read_config, stored_tensors

_MARK = "keeps_float32"
_HALF = (torch.bfloat16, torch.float16)


def restore_float32(model: Any, folder: Path) -> None:
    """Restore in `model`, loaded from `folder` in half precision, the weights that the folder holds in float32."""
    exact = float32_weights(folder)
    half = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dtype in _HALF and not _is_fused(name, weight)
    }
    if not exact or not half:
        return
    own_names = {next(iter(revert_weight_conversion(model, {name: half[name]}))): name for name in half}
    for name in exact.keys() & own_names.keys():
        weight = half[own_names[name]]
        if weight.shape == exact[name].shape:
            with safe_open(exact[name].path, framework="pt") as file:
                value = file.get_tensor(name).to(weight.device)
            if is_shard(weight):
                module, _, own = own_names[name].rpartition(".")
                model.get_submodule(module).register_parameter(own, nn.Parameter(shard_like(value, weight)))
            else:
                weight.data = value


def float32_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the float32 weights of a folder by name; empty unless its config has a half-precision dtype."""
    if saved_dtype(folder) not in _HALF:
        return {}
    return {name: entry for name, entry in stored_tensors(folder).items() if entry.dtype == "F32"}


def saved_dtype(folder: str | Path) -> torch.dtype | None:
    """Return the dtype of the weights, those of the text model, in the folder's config; None if it has none."""
    config = read_config(folder)
    parts = (config.get("text_config") or {}, config)
    name = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    return getattr(torch, name) if name else None


def mark_float32(model: Any) -> None:
    """Remember which weights of a model of half precision are float32, before training makes others so."""
    if model.dtype in _HALF:
        for weight in model.parameters():
            if weight.dtype == torch.float32:
                setattr(weight, _MARK, True)


def written_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to write `weight` in if others are written in `dtype`; None: its own."""
    return torch.float32 if dtype is not None and hasattr(weight, _MARK) else dtype


def _is_fused(name: str, weight: Tensor) -> bool:
    """Return whether a checkpoint stores it as several weights, such as a layer's experts; a convolution is one."""
    return weight.ndim == 3 and not name.endswith("conv1d.weight")
