"""View a model with a vision tower as the text-only model around the same layers.

    model = text_only(Qwen3_5ForConditionalGeneration.from_pretrained(folder))    # a Qwen3_5ForCausalLM

Other weights are frozen, and copied into every folder that is written (rlqwen.models.carried_weights).
"""

import json
import re
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from rlqwen.errors import ModelError
from rlqwen.models.carried_weights import CarriedWeights, carried_by, carry, set_carried
from rlqwen.models.vision_language import is_read_from_whole
from rlqwen.terminal import warn

_LOADING_STATE = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")
"""Attributes that `from_pretrained` leaves on a quantized model."""
_SCALES = re.compile(r"\.weight\..+$|\.(SCB|weight_format)$")
"""Ends of the names of bitsandbytes' scales and formats, for 4 and 8 bits, that go with a quantized `X.weight`."""


def text_only(model: Any) -> Any:
    """Return the text-only model around the layers of `model`, if it has other parts too; else `model` itself.

    The layers are the same objects, so that `model` is trained in place. A PeftModel gets the text-only model as its
    base, in place. Raises ModelError if its adapter is on other layers.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    view = _text_view(base)
    if view is None:
        return model
    if base is model:
        return view
    model.base_model.model = view
    _rename_targets(model, view)
    return model


def _rename_targets(model: Any, view: Any) -> None:
    """Rename targets in adapters' configs as in the text-only model; warn that adapters are saved for that class."""
    adapted = sorted(name for name, module in view.named_modules() if isinstance(module, BaseTunerLayer))
    for config in model.peft_config.values():
        pattern = getattr(config, "target_modules", None)
        if isinstance(pattern, str) and adapted and not any(re.fullmatch(pattern, name) for name in adapted):
            config.target_modules = set(adapted)
    warn(
        f"the adapter is saved as one of {type(view).__name__}: load it on what AutoModelForCausalLM gives, or use the "
        "merged weights, which are of the class for images too",
        stacklevel=4,
    )


def _text_view(whole: Any) -> Any:
    inner = getattr(whole, "base_model", None)
    layers = getattr(inner, "language_model", None)
    if not isinstance(whole, PreTrainedModel) or not isinstance(layers, nn.Module):
        return None
    head = "lm_head" if whole.can_generate() else "score"
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING if head == "lm_head" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    text: Any = whole.config.get_text_config()
    if text is whole.config or type(text) not in classes or not hasattr(whole, head):
        return None
    if not is_read_from_whole(classes[type(text)]):
        return None
    others = _other_weights(whole, layers)
    raw = _config_of(whole)
    if head == "score":
        text.num_labels = whole.config.num_labels
    text.tie_word_embeddings = text.tie_word_embeddings or whole.config.tie_word_embeddings
    text._name_or_path = whole.config._name_or_path
    with torch.device("meta"):
        view = classes[type(text)](text)
    if type(view.base_model) is not type(layers):
        return None
    setattr(view, view.base_model_prefix, layers)
    setattr(view, head, getattr(whole, head))
    _copy_state(whole, view)
    carry(view, view.name_or_path)
    found = carried_by(view) or CarriedWeights(view.name_or_path or "the model that was given")
    set_carried(view, _with_held(found, others, raw, is_quantized=getattr(view, "hf_quantizer", None) is not None))
    return view


def _other_weights(whole: Any, layers: nn.Module) -> dict[str, Tensor]:
    """Freeze the weights outside the text model, and return them under their names in a checkpoint."""
    others: dict[str, Tensor] = {}
    for name, child in whole.base_model.named_children():
        if child is layers:
            continue
        for inner, module in child.named_modules():
            if isinstance(module, BaseTunerLayer):
                raise ModelError(
                    f"the adapter is on {name}.{inner} too, which is outside the text model and not trained: name it "
                    "in the LoraConfig's exclude_modules"
                )
        child.requires_grad_(False)
        others |= child.state_dict(prefix=f"{whole.base_model_prefix}.{name}.")
    return revert_weight_conversion(whole, others)  # type: ignore[no-any-return]


def _config_of(whole: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(whole.config.to_json_string())
    raw.setdefault("text_config", {"model_type": whole.config.get_text_config().model_type})
    return raw | {"architectures": [type(whole).__name__]}


def _copy_state(whole: Any, view: Any) -> None:
    """Copy to the view the attributes that loading and the user have set on the whole model."""
    if whole.can_generate():
        view.generation_config = whole.generation_config
    view.train(whole.training)
    for name in _LOADING_STATE:
        if hasattr(whole, name):
            setattr(view, name, getattr(whole, name))
    if hasattr(whole.config, "quantization_config"):
        view.config.quantization_config = whole.config.quantization_config
    noted = vars(whole).get("_weight_conversions")
    used = None if noted is None else [each._original_source_patterns for each in noted]
    view._weight_conversions = [
        each
        for each in get_model_conversion_mapping(view, add_legacy=False)
        if used is None or isinstance(each, PrefixChange) or each._original_source_patterns in used
    ]


def _with_held(
    found: CarriedWeights, held: dict[str, Tensor], raw: dict[str, Any], *, is_quantized: bool
) -> CarriedWeights:
    """Return the carried weights of a model that holds weights `held` itself, which may differ from those in its files.

    A weight that differs from the file only by a cast at loading is copied from the file.
    """
    obstacle = found.obstacle
    weights: dict[str, Any] = dict(found.weights)
    for name, tensor in held.items():
        stored = found.weights.get(name)
        if is_quantized:
            if _SCALES.sub(".weight", name) not in found.weights:
                obstacle = f"{name!r} is quantized, and its plain weights are not to be found in {found.source!r}"
            continue
        if stored is None or not _is_cast_of(tensor, found.read(name)):
            weights[name] = tensor.detach()
    return replace(found, weights=weights, whole_config=raw, obstacle=obstacle)


def _is_cast_of(tensor: Tensor, stored: Tensor) -> bool:
    return tensor.shape == stored.shape and torch.equal(tensor, stored.to(tensor.device, tensor.dtype))
