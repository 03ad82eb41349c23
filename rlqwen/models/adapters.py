"""Put LoRA and its variants on a model, merge them into plain weights by name, or take them alone for vLLM.

Nothing here changes a weight: merged weights are computed beside the base, one decoder layer at a time.
"""

import copy
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlqwen.config import LoraSettings
from rlqwen.distributed import exact_weight, gathered
from rlqwen.distributed.tensor_parallel import whole_weights
from rlqwen.errors import ModelError
from rlqwen.models.float32_weights import written_dtype
from rlqwen.models.lora_targets import resolve_targets, without_effect
from rlqwen.models.quantization import dequantized_weight, is_8bit, is_quantized
from rlqwen.packing.delta_net import LAYER

VLLM_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Linear layers of dense models that vLLM's LoRA covers, by Qwen's names."""
VLLM_MAX_RANK = 512
_LAYER = re.compile(r"(.*\blayers\.\d+)\.")


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Return PEFT's config of a recipe's `model.lora`."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        **settings.model_dump() | {"lora_alpha": settings.lora_alpha or 2 * settings.r},
    )


def add_adapter(model: PreTrainedModel, config: Any) -> tuple[PeftModel, list[str]]:
    """Put an adapter of `config` on `model`; a fully trained embedding stays tied to the head where it was.

    Returns the model, and notes for the user on what the targets' names came to (rlqwen.models.lora_targets).
    """
    if isinstance(model, PeftModel):
        raise ModelError("the model has an adapter already: leave out peft_config, or merge the adapter first")
    config = copy.deepcopy(config)  # PEFT writes into it
    notes = resolve_targets(model, config) if isinstance(config, LoraConfig) else []
    if model.config.tie_word_embeddings and getattr(config, "modules_to_save", None):
        touched = {name.rpartition(".")[2] for name in config.modules_to_save}
        config.ensure_weight_tying |= bool(touched & {"embed_tokens", "lm_head"})
    try:
        with warnings.catch_warnings():
            if getattr(config, "trainable_token_indices", None):  # PEFT ties these weights, but does not detect it here
                warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`, but no tied modules")
            return get_peft_model(model, config), notes
    except (ValueError, TypeError) as error:
        raise ModelError(f"the adapter cannot be put on this model: {error}") from error


def check_adapter(model: PeftModel, *, reference: bool) -> None:
    """Raise ModelError if an adapter cannot be merged into weights, or if switching it off is not the starting model."""
    check_wrappers(model)
    config: Any  # a LoraConfig, as check_wrappers has seen to
    for config in model.peft_config.values():
        if reference and changes_base(config):
            raise ModelError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weights, so that the model with its "
                "adapter off is not the reference: use true, 'gaussian' or 'orthogonal', or do without a reference"
            )
        if reference and config.bias != "none":
            raise ModelError(f"bias={config.bias!r} trains biases that the reference would share: use bias='none'")
    base: Any = model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            variants = {type(variant).__name__ for variant in module.lora_variant.values()}
            unknown = {variant for variant in variants if not variant.startswith("Dora")}
            if unknown or any(module.lora_bias.values()):
                raise ModelError(f"{name}: an adapter with {', '.join(unknown) or 'lora_bias'} has no merged weights")
            if variants and is_8bit(module.get_base_layer()) and module.get_base_layer().weight.device.type == "cpu":
                # It moves the weight at each forward, and the scales are not moved with it (PEFT 0.21).
                raise ModelError(f"{name}: PEFT cannot train DoRA on 8-bit weights on CPU; use 4 bits, or plain LoRA")
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not base.config.tie_word_embeddings:
        return
    if isinstance(embedding, LoraLayer) or isinstance(head, LoraLayer):
        raise ModelError(
            "embed_tokens and lm_head of this model are one weight, which low-rank adapters on them would make two: "
            "put embed_tokens into modules_to_save, or leave both out of target_modules"
        )
    if isinstance(embedding, TrainableTokensWrapper) or isinstance(head, TrainableTokensWrapper):
        tied_to = getattr(getattr(head, "token_adapter", None), "tied_adapter", None)
        if tied_to is None or tied_to is not getattr(embedding, "token_adapter", None):
            raise ModelError(
                "embed_tokens and lm_head of this model are one weight, and trainable_token_indices would make them two: "
                "give it the tokens of embed_tokens alone, as a list"
            )
    elif _active(embedding).weight is not _active(head).weight:
        raise ModelError(
            "embed_tokens and lm_head of this model are one weight, and its adapter trains only one of them: "
            "set ensure_weight_tying=True in the LoraConfig"
        )


def check_wrappers(model: PeftModel) -> None:
    """Refuse PEFT's modules that are merged in no way known here: weights would be saved under their inner names.

    Raises ModelError that names the kind of adapter, or the module and its class.
    """
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig):
            raise ModelError(f"rlqwen trains LoRA, rsLoRA and DoRA adapters, not {type(config).__name__}'s")
    known = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper, TrainableTokensLayer)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Conv1d):
            raise ModelError(without_effect(name))
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, known):
            raise ModelError(
                f"{name} is wrapped in PEFT's {type(module).__name__}, which rlqwen cannot merge into plain weights: use "
                "LoRA, modules_to_save or trainable_token_indices"
            )


def changes_base(config: LoraConfig) -> bool:
    """Return whether putting the adapter on changes the weights under it, as PiSSA (arXiv 2404.02948) and OLoRA do."""
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva")


def adapted_weight(layer: Any) -> Tensor:
    """Return the weight of a layer with its adapters merged; float32, differentiable.

    LoRA (arXiv 2106.09685) adds B A scaled. DoRA (arXiv 2402.09353) scales each output's row of that sum to a trained
    magnitude, with the norm taken as a constant in the gradient. Dropout has no part in it.
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
    """Return the name of the parameter that the layer's adapters act on: fused experts have others than `weight`."""
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
    """Return the (V, C) weight of the head, with its adapter merged, if it has one; differentiable."""
    head = _active(model.get_output_embeddings())
    if isinstance(head, TrainableTokensWrapper):
        return _with_trained_rows(head)
    return adapted_weight(head) if isinstance(head, LoraLayer) else head.weight


def _with_trained_rows(wrapper: TrainableTokensWrapper) -> Tensor:
    """Return the (V, C) weight of an embedding or head with the rows that PEFT trains put in; differentiable."""
    layer = wrapper.token_adapter
    active = [] if layer.disable_adapters else layer.active_adapters
    return layer.get_merged_weights(active)


def lora_obstacle(model: PeftModel) -> str | None:
    """Return why vLLM cannot apply the adapter itself, so that merged weights must be sent; None if it can."""
    base: Any = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    misplaced = sorted({name.rpartition(".")[2] for name in layers} - VLLM_PROJECTIONS)
    if len(model.active_adapters) != 1:
        return "not exactly one adapter is active"
    if any(layer.lora_variant for layer in layers.values()):
        return "vLLM has no DoRA"
    if any(isinstance(module, ModulesToSaveWrapper) for module in base.modules()):
        return "modules_to_save trains whole modules beside the adapter"
    if any(isinstance(module, TrainableTokensWrapper) for module in base.modules()):
        return "trainable_token_indices trains rows of the embedding beside the adapter"
    if model.active_peft_config.bias != "none":
        return "biases are trained beside the adapter"
    if getattr(base.config.get_text_config(), "num_experts", None):
        return "the model is a mixture of experts"
    if LAYER in (getattr(base.config.get_text_config(), "layer_types", None) or ()):
        return "vLLM has no adapters for models with delta-net layers on every machine"
    if misplaced:
        return f"vLLM puts no adapter on {', '.join(misplaced)}"
    rank = adapter_rank(model)
    return None if rank <= VLLM_MAX_RANK else f"its rank {rank} is above vLLM's largest, {VLLM_MAX_RANK}"


def adapter_rank(model: PeftModel) -> int:
    """Return the largest rank among the layers of the active adapter."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return max(int(layer.r[model.active_adapter]) for layer in layers)


def adapter_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the active adapter's A and B under PEFT's names, with the scaling folded into B, as if alpha were r."""
    adapter = model.active_adapter
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            pair: Any = layer
            down, up = pair.lora_A[adapter].weight, pair.lora_B[adapter].weight
            with gathered([down, up]):
                own = down.detach(), up.detach() * layer.scaling[adapter]
            yield f"base_model.model.{name}.lora_A.weight", own[0]
            yield f"base_model.model.{name}.lora_B.weight", own[1]


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its checkpoint name: adapters merged, quantized weights plain, a tied head included.

    Mixture-of-experts weights go back from transformers' fused form. `dtype` None keeps each weight's own: what it was
    quantized from, and the base's for a merged one. Weights that `mark_float32` has marked are float32 in any case.
    """
    named = _plain_weights(model, "", dtype)
    for _, group in itertools.groupby(named, key=_layer_of):
        yield from revert_weight_conversion(model, dict(group)).items()


def _layer_of(entry: tuple[str, Tensor]) -> str:
    """Return the key of weights that must be converted together: fused experts lie within one decoder layer."""
    match = _LAYER.match(entry[0])
    return match[1] if match else ""


def _plain_weights(module: Any, prefix: str, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `module` under the names that they had before PEFT and bitsandbytes wrapped them."""
    module = _active(module)
    # One layer at a time is put together where weights lie in shards; what is yielded is held by whoever takes it.
    wrapped = isinstance(module, (LoraLayer, TrainableTokensWrapper))
    with gathered(module.parameters() if wrapped else module._parameters.values()):
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
    with whole_weights([module]):
        for name, (tensor, own_dtype) in saved.items():
            weight = (replaced[name] if name in replaced else exact_weight(tensor, own_dtype)).detach()
            own[name] = weight.to(own_dtype if weight.is_floating_point() else None)
    return module, own


def _active(module: Any) -> Any:
    """Return the module in use, if PEFT holds a trained copy beside the original."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapters[0]]
