"""Count the parameters of a model, group by group, and those that a recipe trains, from its config alone.

Models are built on torch's meta device, where weights have shapes and no bytes: half a second for 400 billion.
"""

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.config import LoraSettings
from rlqwen.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = {
    "embedding": r"\bembed_tokens\.",
    "head": r"^(lm_head|score)\.",
    "norms": r"norm[^.]*\.(weight|bias)$",
    "delta-net": r"\.linear_attn\.",
    "attention": r"\.(self_attn|attn|attention)\.",
    "routed experts": r"\.experts\.",
    "shared experts": r"\.shared_experts?(_gate)?\.",
    "routers": r"\.(mlp|feed_forward|block_sparse_moe)\.(gate|router)\.",
    "MLP": r"\.(mlp|feed_forward)\.",
    "other": "",
}
"""Group -> a pattern in the names of its parameters; the first match counts."""
_SHOWN = (
    "embedding", "attention", "delta-net", "MLP", "routed experts", "shared experts", "routers", "norms", "head", "other",
)  # fmt: skip
"""Groups in the order of the forward pass."""
_TOWER = re.compile(r"\b(visual|vision_\w+|multi_modal_projector)\.")
"""Found in names of modules that turn images into embeddings."""
_INSIDE_ADAPTER = re.compile(r"(\.base_layer)*\.(lora_|modules_to_save|token_adapter|trainable_tokens)")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, group by group."""

    parts: dict[str, int]
    """Groups of the text model, which is what is trained; groups that it does not have are left out."""
    carried: dict[str, int]
    """What checkpoints hold besides the text model: `vision tower`, `multi-token prediction`."""
    active: int
    """Parameters of the text model that one token uses: of the routed experts, the chosen ones."""

    @property
    def total(self) -> int:
        """Return the number of parameters of the text model."""
        return sum(self.parts.values())


def meta_model(config: Any, *, scalar: bool = False) -> "PreTrainedModel":
    """Build the text model of `config` without weights; with `scalar`, one that outputs a number.

    If transformers has no class for the text part alone, build the whole model, with its vision tower frozen. Raises
    ModelError if it has neither.
    """
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    text = copy.deepcopy(config.get_text_config())
    is_whole = text is not config and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and not scalar
    try:
        with torch.device("meta"):
            if scalar:
                text.num_labels = 1
                return AutoModelForSequenceClassification.from_config(text)  # type: ignore[no-any-return]
            if is_whole:
                return AutoModelForImageTextToText.from_config(copy.deepcopy(config))  # type: ignore[no-any-return]
            return AutoModelForCausalLM.from_config(text)  # type: ignore[no-any-return]
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"transformers cannot build a model of type {config.model_type!r}: {error}") from error


def count_parameters(config: Any, model: "PreTrainedModel", folder: Path | None = None) -> ParameterCounts:
    """Count the parameters of `model`, which `meta_model` built from `config`, and those that are carried besides it.

    Carried parameters are counted in the weight files of `folder` if it has any, otherwise from the config.
    """
    parts = dict.fromkeys(_SHOWN, 0)
    tower = 0
    for name, parameter in model.named_parameters():
        if _TOWER.search(name):
            tower += parameter.numel()
        else:
            parts[_part_of(name)] += parameter.numel()
    text: Any = config.get_text_config()
    total, routed = sum(parts.values()), parts["routed experts"]
    used, experts = chosen_experts(text)
    active = total - (routed - routed * used // experts if experts else 0)
    carried = {"vision tower": tower} if tower else None if folder is None else _carried_in(folder)
    if carried is None:
        carried = {
            "vision tower": _vision_tower(config),
            "multi-token prediction": _multi_token_prediction(text, model),
        }
    return ParameterCounts(
        {part: number for part, number in parts.items() if number},
        {part: number for part, number in carried.items() if number},
        active,
    )


def chosen_experts(text_config: Any) -> tuple[int, int]:
    """Return (experts that a layer chooses per token, experts of a layer); (0, 0) without experts."""
    count = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None) or 0
    return (int(getattr(text_config, "num_experts_per_tok", None) or count), int(count)) if count else (0, 0)


def trained_parameters(model: "PreTrainedModel", settings: LoraSettings) -> tuple[dict[str, int], list[str]]:
    """Put the adapter of `settings` on `model`, which `meta_model` built.

    Returns the trained parameters by the names of the modules they belong to, and notes on what those names matched.
    Raises ModelError if the adapter does not fit the model.
    """
    import torch

    from rlqwen.models.adapters import add_adapter, check_wrappers, lora_config
    from rlqwen.models.critic import scalar_peft_config

    config = lora_config(settings)
    if model.get_output_embeddings() is None:
        config = scalar_peft_config(config)
    with torch.device("meta"):
        adapted, notes = add_adapter(model, config)
    check_wrappers(adapted)
    trained: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            target = ".".join(_INSIDE_ADAPTER.split(name)[0].split(".")[-2:])
            target = target if target.startswith("shared_expert.") else target.rpartition(".")[2]
            trained[target] = trained.get(target, 0) + parameter.numel()
    return trained, notes


def _carried_in(folder: Path) -> dict[str, int] | None:
    """Count a folder's weights for which the text model has no place; None if the folder has no weights."""
    from rlqwen.models.carried_weights import ignored_in_folder, kind_of
    from rlqwen.models.hub import stored_tensors

    stored = stored_tensors(folder)
    if not stored:
        return None
    carried: dict[str, int] = {}
    for name in sorted(ignored_in_folder(folder, stored)):
        carried[kind_of(name)] = carried.get(kind_of(name), 0) + math.prod(stored[name].shape)
    return carried


def _part_of(name: str) -> str:
    return next(part for part, pattern in _PARTS.items() if re.search(pattern, name))


def _vision_tower(config: Any) -> int:
    """Count the parameters of the vision tower in the class that also reads images; 0 without one."""
    import torch
    from transformers import AutoModelForImageTextToText

    if getattr(config, "vision_config", None) is None:
        return 0
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 1  # the tower does not depend on the text model's depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForImageTextToText.from_config(config)
    except (ValueError, KeyError, AttributeError, ImportError):
        return 0
    named = whole.named_parameters()
    return sum(parameter.numel() for name, parameter in named if _TOWER.search(name))


def _multi_token_prediction(text_config: Any, model: "PreTrainedModel") -> int:
    """Count the parameters of Qwen's multi-token prediction, which transformers does not load.

    Each of its layers is a decoder layer with full attention. Once, there are a product that joins two hidden states,
    and three norms. Embedding and head are shared with the text model.
    """
    num_layers = getattr(text_config, "mtp_num_hidden_layers", None) or 0
    if not num_layers:
        return 0
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"]
    base: Any = model.base_model
    layer: int = sum(parameter.numel() for parameter in base.layers[kinds.index("full_attention")].parameters())
    width = int(text_config.hidden_size)
    return int(num_layers) * layer + 2 * width * width + 3 * width
