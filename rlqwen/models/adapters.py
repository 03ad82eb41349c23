"""Put LoRA and its variants on a model, check what they can do there, and export them alone for vLLM."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlqwen.config import LoraSettings
from rlqwen.distributed import gathered
from rlqwen.errors import ModelError
from rlqwen.models.folder_files import check_weight_file
from rlqwen.models.lora_targets import resolve_targets, without_effect
from rlqwen.models.merged_weights import active_module
from rlqwen.models.quantization import is_8bit
from rlqwen.models.weight_checks import refuse_nonfinite
from rlqwen.packing.delta_net import LAYER

VLLM_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Linear layers of dense models that vLLM's LoRA covers, by Qwen's names."""
VLLM_MAX_RANK = 512


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Return PEFT's config of a recipe's `model.lora`."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        **settings.model_dump() | {"lora_alpha": settings.lora_alpha or 2 * settings.r},
    )


def reads_base(config: Any) -> bool:
    """Return whether putting the adapter on reads or copies weights of the base, which must then be whole."""
    if not isinstance(config, LoraConfig):
        return config is not None
    copied = set(config.modules_to_save or ()) - {"score"}  # a head of one number is never cut
    of_parameters = config.target_parameters or config.trainable_token_indices
    return bool(copied or of_parameters or config.use_dora or changes_base(config) or config.init_lora_weights == "eva")


def add_adapter(model: PreTrainedModel, config: Any) -> tuple[PeftModel, list[str]]:
    """Put an adapter of `config` on `model`; a fully trained embedding stays tied to the head if it was.

    Returns the model, and notes for the user on what the targets' names matched (rlqwen.models.lora_targets).
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
    elif active_module(embedding).weight is not active_module(head).weight:
        raise ModelError(
            "embed_tokens and lm_head of this model are one weight, and its adapter trains only one of them: "
            "set ensure_weight_tying=True in the LoraConfig"
        )


def check_wrappers(model: PeftModel) -> None:
    """Refuse modules of PEFT that rlqwen cannot merge, because their weights would be saved under inner names.

    Raises ModelError with the kind of adapter, or the module and its class.
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


def read_adapter(path: Path, model: PeftModel) -> dict[str, Tensor]:
    """Return the weights of a saved adapter; raise ModelError unless they are those of this model's adapter."""
    if not path.is_file():
        raise ModelError(f"there is no adapter {str(path)!r}")
    check_weight_file(path)
    weights = load_file(path)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted, found = ({name: tuple(one.shape) for name, one in part.items()} for part in (own, weights))
    unfit = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if unfit:
        shown = [
            f"{name} is {found.get(name, 'missing')} instead of {wanted.get(name, 'absent')}" for name in unfit[:3]
        ]
        raise ModelError(
            f"{str(path)!r} is an adapter for another model, or of other settings: {len(unfit)} of its weights differ: "
            f"{', '.join(shown)}"
        )
    refuse_nonfinite(str(path), weights.items())
    return weights


def changes_base(config: LoraConfig) -> bool:
    """Return whether putting the adapter on changes the weights under it, as PiSSA (arXiv 2404.02948) and OLoRA do."""
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower() not in ("gaussian", "orthogonal", "eva")


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
            down, up = pair.lora_A[adapter], pair.lora_B[adapter]
            with gathered([down, up]):
                own = down.weight.detach(), up.weight.detach() * layer.scaling[adapter]
            yield f"base_model.model.{name}.lora_A.weight", own[0]
            yield f"base_model.model.{name}.lora_B.weight", own[1]
