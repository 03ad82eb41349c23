"""Train the text model of models for images and text in place, with a frozen vision tower.

For Qwen3.5 transformers has a text-only class, and maps the names of its weights to those of the full checkpoint: that
class is trained (rlqwen.models.text_only). For Qwen3-VL, Qwen2.5-VL, Gemma 3 and others it has no such class, or
one with other names; they are trained and written as the class with all parts.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange

_TEXT_PART = "language_model"


def is_read_from_whole(text_class: type[Any]) -> bool:
    """Return whether transformers reads this text-only class from a full checkpoint, and writes the names of that."""
    model_type = text_class.config_class.model_type
    known = (
        get_checkpoint_conversion_mapping(text_class.__name__) or get_checkpoint_conversion_mapping(model_type) or ()
    )
    return any(isinstance(each, PrefixChange) and each.prefix_to_remove == _TEXT_PART for each in known)


def auto_class(config_class: Any) -> Any:
    """Return the auto class that loads a model of this config for generation."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if config_class in whole and config_class not in causal else AutoModelForCausalLM


def towers(model: Any) -> dict[str, nn.Module]:
    """Return the modules of `model` outside its text model by name, such as a vision tower; empty if there are none."""
    inner = model.base_model
    if inner is model or not isinstance(getattr(inner, _TEXT_PART, None), nn.Module):
        return {}
    prefix = model.base_model_prefix
    return {f"{prefix}.{name}": child for name, child in inner.named_children() if name != _TEXT_PART}


def exclusion(towers: Iterable[str], excluded: str | Iterable[str] | None = None) -> str:
    """Return a regular expression for PEFT's `exclude_modules`: the modules of `towers`, and what `excluded` excludes."""
    patterns = [rf"{re.escape(name)}(\..*)?" for name in towers]
    if isinstance(excluded, str):
        patterns.append(f"(?:{excluded})")
    else:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in excluded or ()]
    return "|".join(patterns)
