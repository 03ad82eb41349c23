"""Merge adapters into plain weights under their names in a checkpoint.

No weight of the model changes: merged weights are computed separately, for one decoder layer at a time.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlqwen.distributed import exact_weight, gathered
from rlqwen.models.float32_weights import written_dtype
from rlqwen.models.quantization import dequantized_weight, is_quantized

_LAYER = re.compile(r"(.*\blayers\.\d+)\.")


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its checkpoint name: adapters merged, quantized weights plain, a tied head included.

    Mixture-of-experts weights go back from transformers' fused form. With `dtype` None each weight keeps its dtype: a
    quantized weight that of its original, a merged one that of its base. Weights marked by `mark_float32` are float32.
    """
    named = _plain_weights(model, "", dtype)
    for _, group in itertools.groupby(named, key=_layer_of):
        yield from revert_weight_conversion(model, dict(group)).items()


def _layer_of(entry: tuple[str, Tensor]) -> str:
    """Return the key of weights that must be converted together: the experts in one weight are of one decoder layer."""
    match = _LAYER.match(entry[0])
    return match[1] if match else ""


def _plain_weights(module: Any, prefix: str, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `module` under the names that they had before PEFT and bitsandbytes wrapped them."""
    module = active_module(module)
    # Sharded weights are gathered for one layer at a time; only the caller keeps what is yielded.
    wrapped = isinstance(module, (LoraLayer, TrainableTokensWrapper))
    with gathered(module.modules() if wrapped else [module]):
        module, own = _own_weights(module, dtype)
    for name, tensor in own.items():
        yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _plain_weights(child, f"{prefix}{name}.", dtype)


def _own_weights(module: Any, dtype: torch.dtype | None) -> tuple[Any, dict[str, Tensor]]:
    """Return the module under the adapters, and its own weights and buffers by name."""
    replaced: dict[str, Tensor] = {}
    if isinstance(module, TrainableTokensWrapper):
        replaced["weight"] = _with_trained_rows(module)
        module = module.original_module
    while isinstance(module, LoraLayer):
        base = _base_weight(module)
        replaced[_adapted_name(module)] = adapted_weight(module).to(written_dtype(base, dtype) or base.dtype)
        module = module.base_layer
    if is_quantized(module):
        replaced.setdefault("weight", dequantized_weight(module))
    state = {**module._parameters, **module._buffers}
    saved = {
        name: (tensor, written_dtype(tensor, dtype))
        for name, tensor in state.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    }
    own: dict[str, Tensor] = {}
    for name, (tensor, own_dtype) in saved.items():
        weight = (replaced[name] if name in replaced else exact_weight(tensor, own_dtype)).detach()
        own[name] = weight.to(own_dtype if weight.is_floating_point() else None)
    return module, own


def adapted_weight(layer: Any) -> Tensor:
    """Return the weight of a layer with its adapters merged; float32, differentiable.

    LoRA (arXiv 2106.09685) adds B A scaled. DoRA (arXiv 2402.09353) scales each output's row of that sum to a trained
    magnitude, with the norm taken as a constant in the gradient. Dropout is not applied.
    """
    base = _base_weight(layer).float()
    total = base
    for adapter in layer.active_adapters if not layer.disable_adapters else ():
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            delta = _delta(layer, adapter).to(base.device, torch.float32)
            total = total + (_dora(layer, adapter, base, delta) - base if layer.use_dora.get(adapter) else delta)
    return total


def _delta(layer: Any, adapter: str) -> Tensor:
    """Return what an adapter adds to the weight; float32 for parameters, which PEFT would round to the base's dtype."""
    if not isinstance(layer, lora_layers.ParamWrapper):
        return layer.get_delta_weight(adapter)  # type: ignore[no-any-return]
    wrapper: Any = layer
    scaling: float = wrapper.scaling[adapter]
    down: Tensor = wrapper.lora_A[adapter].weight.float()
    up: Tensor = wrapper.lora_B[adapter].weight.float()
    if wrapper.num_experts == 1:
        return up @ down * scaling
    down_ERI = down.reshape(wrapper.num_experts, -1, down.shape[-1])
    up_ORE = up.reshape(up.shape[0], -1, wrapper.num_experts)
    order = "eoi" if wrapper._did_swap_in_out_features else "eio"
    return torch.einsum(f"ore,eri->{order}", up_ORE, down_ERI) * scaling


def _base_weight(layer: Any) -> Tensor:
    """Return the weight under the adapters, in its own dtype; a quantized one is dequantized."""
    base = layer.get_base_layer()
    return dequantized_weight(base) if is_quantized(base) else getattr(base, _adapted_name(layer))


def _adapted_name(layer: Any) -> str:
    """Return the name of the parameter that the layer's adapters act on: `weight`, except for fused experts."""
    return getattr(layer, "parameter_name", "weight")


def _dora(layer: Any, adapter: str, base: Tensor, delta: Tensor) -> Tensor:
    """Return DoRA's weight, magnitude * (base + delta) / norm; an embedding is the transpose of a linear layer."""
    transposed = isinstance(layer, lora_layers.Embedding)
    whole = base + delta
    norm = torch.linalg.norm(whole, dim=0 if transposed else 1).detach()
    factor = layer.lora_magnitude_vector[adapter].weight / norm
    scaled: Tensor = whole * (factor[None, :] if transposed else factor[:, None])
    return scaled


def head_weight(model: PreTrainedModel) -> Tensor:
    """Return the (V, C) weight of the head, with its adapter merged if it has one; differentiable."""
    head = active_module(model.get_output_embeddings())
    if isinstance(head, TrainableTokensWrapper):
        return _with_trained_rows(head)
    return adapted_weight(head) if isinstance(head, LoraLayer) else head.weight


def _with_trained_rows(wrapper: TrainableTokensWrapper) -> Tensor:
    """Return the (V, C) weight of an embedding or head with the rows that PEFT trains put in; differentiable."""
    layer = wrapper.token_adapter
    active = [] if layer.disable_adapters else layer.active_adapters
    return layer.get_merged_weights(active)


def active_module(module: Any) -> Any:
    """Return the module in use: PEFT may hold a trained copy of the original."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]
