"""Replay routing: choose the sampler's experts again in the trainer's forward (R3, arXiv 2510.11370).

Sampler and trainer round differently. If two experts are almost equally likely, a token may go to different experts in
the two, and its logprob differs by far more than rounding. With replay the trainer's routers take the experts that the
sampler recorded, weighted by their own probabilities, so that gradients reach the routers.

Shapes: T tokens of a forward, L decoder layers, K experts per token, E experts of a layer.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlqwen.config import RolloutConfig

KEYWORD = "routed_experts"
"""Argument of the model's forward that reaches decoder layers, also when gradient checkpointing runs them again."""
NOT_RECORDED = -1
_LAYER = re.compile(r"(.*\blayers\.(\d+))\.")
_ATTRIBUTE = "rlqwen_routing_replay"


class RoutingReplay:
    """Hook a model's decoder layers and routers; without recorded experts the hooks change nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Register the hooks; ConfigError if the model has no routers."""
        routers = routers_of(model)
        RolloutConfig.check_experts(type(model).__name__, len(routers))
        self._now: dict[nn.Module, Tensor] = {}
        """Recorded experts of the running layer, by router."""
        self._differ: Tensor | None = None
        self._recorded: Tensor | float = 0.0
        for name, router in routers.items():
            match = _LAYER.match(name)
            assert match is not None, f"{name} is in no decoder layer"
            layer = model.get_submodule(match[1])
            layer.register_forward_pre_hook(self._before(router, int(match[2])), with_kwargs=True)
            layer.register_forward_hook(self._after(router), always_call=True)
            router.register_forward_hook(self._route)
        setattr(model, _ATTRIBUTE, self)

    def _before(self, router: nn.Module, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            experts_TLK = kwargs.get(KEYWORD)
            if experts_TLK is not None:
                self._now[router] = experts_TLK[:, index]
            return args, {name: value for name, value in kwargs.items() if name != KEYWORD}

        return hook

    def _after(self, router: nn.Module) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            self._now.pop(router, None)

        return hook

    def _route(self, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...] | None:
        """Take the recorded experts, if there are any, with the weights that the router gives them."""
        recorded_TK = self._now.get(router)
        if recorded_TK is None:
            return None
        logits_TE, weights_TK, own_TK = output
        if recorded_TK.shape != own_TK.shape:
            raise ValueError(f"experts recorded for {tuple(recorded_TK.shape)} do not fit a router's {own_TK.shape}")
        is_known_T1 = recorded_TK[:, :1] != NOT_RECORDED
        chosen_TK = torch.where(is_known_T1, recorded_TK.to(own_TK.dtype), own_TK)
        probs_TK = logits_TE.softmax(-1, dtype=torch.float32).gather(-1, chosen_TK)
        if getattr(router, "norm_topk_prob", True):
            probs_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
        if torch.is_grad_enabled():
            self._count(own_TK, chosen_TK, is_known_T1)
        return logits_TE, probs_TK.to(weights_TK.dtype), chosen_TK

    @torch.no_grad()
    def _count(self, own_TK: Tensor, chosen_TK: Tensor, is_known_T1: Tensor) -> None:
        differ = (own_TK.sort(-1).values != chosen_TK.sort(-1).values).any(-1).sum()
        self._differ = differ if self._differ is None else self._differ + differ
        self._recorded = self._recorded + is_known_T1.sum()

    def metrics(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Return metrics since the last call, over all ranks; none if nothing was replayed.

        `router/replay_differs`: share of tokens, layer by layer, that the trainer's routers would have sent elsewhere.
        """
        own = (0.0, 0.0) if self._differ is None else (float(self._differ), float(self._recorded))
        self._differ, self._recorded = None, 0.0
        parts = gather(own)
        recorded = sum(part[1] for part in parts)
        return {"router/replay_differs": sum(part[0] for part in parts) / recorded} if recorded else {}


def replay_arguments(model: PreTrainedModel, experts_TLK: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a forward over T tokens for recorded experts; none if the model does not replay."""
    if experts_TLK is None or not hasattr(model, _ATTRIBUTE):
        return {}
    return {KEYWORD: experts_TLK}


def routers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that choose experts, by name."""
    recorders: Any = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    classes = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}
