"""Run the experts of a mixture in the forward's precision: torch.autocast does not cover the grouped product.

transformers' own choice for experts, `grouped_mm`, takes its operands in the dtype of the weights. Trained weights are
float32, so that under autocast to bfloat16 the experts, which are nearly all of the model, would run in float32. Its
other implementations, `eager` and `batched_mm`, are made of products that autocast covers.

Shapes: T tokens, E experts, K experts per token, C hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

GROUPED_EXPERTS = "rlqwen_grouped_mm"
_WEIGHTS = frozenset({"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"})


def use_compute_dtype(model: PreTrainedModel) -> None:
    """Run experts that use grouped products in autocast's dtype; leave other implementations unchanged."""
    config: Any = model.config
    text = config.get_text_config()
    if getattr(text, "_experts_implementation", None) == "grouped_mm":
        parts = [name for name in config.sub_configs if getattr(config, name) is text]
        model.set_experts_implementation(dict.fromkeys(parts, GROUPED_EXPERTS) if parts else GROUPED_EXPERTS)


def grouped_experts(module: Any, hidden_TC: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the (T, C) output of experts as `grouped_mm` computes it, with operands in autocast's dtype if it is on.

    Gradients reach the weights of `module` in their own dtype, through the casts. Decoding a few tokens goes through
    `batched_mm`, which reads only the chosen experts.
    """
    device = hidden_TC.device.type
    if not torch.is_autocast_enabled(device):
        return grouped_mm_experts_forward(module, hidden_TC, experts_TK, weights_TK)
    if not torch.is_grad_enabled() and experts_TK.numel() <= module.num_experts:
        return batched_mm_experts_forward(module, hidden_TC, experts_TK, weights_TK)
    dtype = torch.get_autocast_dtype(device)
    cast: Any = _Cast(module, dtype)
    output_TC = grouped_mm_experts_forward(cast, hidden_TC.to(dtype), experts_TK, weights_TK)
    return output_TC.to(hidden_TC.dtype)


class _Cast:
    """Stand in for the experts' module with weights cast to another dtype, adapters included."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if name in _WEIGHTS else value


ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, grouped_experts)
