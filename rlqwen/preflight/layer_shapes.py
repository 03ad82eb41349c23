"""Read from a model on the meta device what its decoder layers are made of, so that plans need not walk it again."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

_MIXER = re.compile(r"(^|\.)(self_attn|attn|attention|linear_attn)\.")
_EXPERTS = re.compile(r"(^|\.)experts\.")
_NORM_OR_ROUTER = re.compile(r"norm[^.]*\.(weight|bias)$|(^|\.)(mlp|feed_forward|block_sparse_moe)\.(gate|router)\.")


@dataclass(frozen=True)
class LayerShape:
    """Numbers of parameters of one decoder layer, adapters included, and what decides which activations it keeps."""

    kind: str
    """`full_attention` or `linear_attention`."""
    has_query_norm: bool
    mixer: int
    """Attention or delta-net, without norms."""
    mlp: int
    """The MLP, or the shared experts."""
    experts: int
    """All routed experts."""
    whole: int
    """Norms and routers, which tensor parallel ranks do not divide."""

    @property
    def total(self) -> int:
        return self.mixer + self.mlp + self.experts + self.whole

    @property
    def dense(self) -> int:
        """Return the parameters that expert parallel ranks do not divide."""
        return self.mixer + self.mlp + self.whole


def layer_shapes(model: nn.Module, config: Any) -> Counter[LayerShape]:
    """Return the different shapes of the decoder layers of `model`, and how many layers have each.

    `config`: that of the text model.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return Counter(_shape_of(layer, kind) for layer, kind in zip(decoder_layers(model, config), kinds, strict=True))


def decoder_layers(model: nn.Module, config: Any) -> list[nn.Module]:
    """Return the decoder layers of the text model."""
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    return list(found[-1])  # those of a vision tower come first


def _shape_of(layer: nn.Module, kind: str) -> LayerShape:
    sizes = dict.fromkeys(("mixer", "mlp", "experts", "whole"), 0)
    for name, parameter in layer.named_parameters():
        if _NORM_OR_ROUTER.search(name):
            part = "whole"
        elif _MIXER.search(name):
            part = "mixer"
        else:
            part = "experts" if _EXPERTS.search(name) else "mlp"
        sizes[part] += parameter.numel()
    has_query_norm = any(name.endswith("q_norm") for name, _ in layer.named_modules())
    return LayerShape("linear_attention" if kind == "linear_attention" else "full_attention", has_query_norm, **sizes)
