"""Balance the routers of a mixture of experts by a loss, and measure how even their load is.

Shapes: T tokens of a packed row, L layers that have experts, E experts per layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlqwen.errors import ConfigError
from rlqwen.packing.routing_replay import routers_of
from rlqwen.packing.sequence_parallel import SequenceGroup


def load_balancing_loss(
    router_logits: Sequence[Tensor], top_k: int, sequence: SequenceGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Return Switch Transformer's loss (arXiv 2101.03961, eq. 4-6) as transformers has it: E * sum over experts of f P.

    f is the share of tokens that choose an expert among their `top_k`, P its probability; both are means over the tokens
    of all layers as if they were one. The loss is `top_k` if the load is even, and more if it is not.

    Args:
        router_logits: L tensors (T, E).
        sequence: ranks that each hold a slice of the row; their slices count together (T tokens are this rank's).

    Returns:
        The scalar loss in float32, with gradient only through P, and (L, E) counts of this rank's tokens.
    """
    probs_LTE = torch.stack([logits.float().softmax(-1) for logits in router_logits])
    num_layers, num_tokens, num_experts = probs_LTE.shape
    chosen_LTK = probs_LTE.topk(top_k, dim=-1).indices
    counts_LE = probs_LTE.new_zeros(num_layers, num_experts).scatter_add_(
        1, chosen_LTK.flatten(1), probs_LTE.new_ones(num_layers, num_tokens * top_k)
    )
    sums_2E = torch.stack([counts_LE.sum(0), probs_LTE.sum((0, 1))])
    if sequence is not None:
        sums_2E = sequence.add_up(sums_2E)
    share_E, prob_E = sums_2E / (sums_2E[0].sum() / top_k)  # by the tokens of all layers
    return num_experts * (share_E * prob_E).sum(), counts_LE


class RouterBalance:
    """Compute the weighted router loss of one model, and collect its metrics."""

    def __init__(self, model: PreTrainedModel, coefficient: float | None) -> None:
        """Take a coefficient; None: the model's own, and 0 if its routers are not trained.

        Raises ConfigError if one is given for a model without experts.
        """
        config: Any = model.config.get_text_config()
        has_routers = hasattr(config, "output_router_logits") and hasattr(config, "num_experts_per_tok")
        if coefficient and not has_routers:
            raise ConfigError(
                f"router_aux_loss_coef={coefficient} is for mixtures of experts, and {type(model).__name__} is none: "
                "leave it out"
            )
        self.coefficient: float = coefficient or 0.0
        self.note: str | None = None
        if has_routers and coefficient is None:
            self.coefficient = getattr(config, "router_aux_loss_coef", 0.0)
            if self.coefficient and not trains_routers(model):
                self.coefficient = 0.0
                self.note = (
                    "the routers are frozen, so their load-balancing loss is left out; set router_aux_loss_coef to "
                    "train the adapter with it"
                )
        self.top_k: int = config.num_experts_per_tok if has_routers else 0
        self._counts_LE: Tensor | None = None
        self._loss: Tensor | float = 0.0
        self._weight = 0.0

    def loss(self, router_logits: Sequence[Tensor], weight: float, sequence: SequenceGroup) -> Tensor:
        """Return the loss of one micro-batch times the coefficient and its share of the update, `weight`."""
        loss, counts_LE = load_balancing_loss(router_logits, self.top_k, sequence)
        if not weight:
            return 0.0 * loss  # an idle row has no load
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        self._loss = self._loss + weight * loss.detach().double()
        self._weight += weight
        return self.coefficient * weight * loss

    def metrics(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Return metrics since the last call over all ranks, whose values `gather` returns; none without a loss.

        `router/aux_loss` is the loss before the coefficient; `router/max_load` the largest share of a layer's
        assignments that goes to one expert, 1 / E where the load is even.
        """
        if not self.coefficient:
            return {}
        counts = None if self._counts_LE is None else self._counts_LE.cpu()
        parts = gather((float(self._loss), self._weight, counts))
        self._counts_LE, self._loss, self._weight = None, 0.0, 0.0
        counted = [counts_LE for _, _, counts_LE in parts if counts_LE is not None]
        if not counted:
            return {}
        total_LE = torch.stack(counted).sum(0)
        return {
            "router/aux_loss": sum(loss for loss, _, _ in parts) / sum(weight for _, weight, _ in parts),
            "router/max_load": (total_LE / total_LE.sum(1, keepdim=True)).max().item(),
        }


def trains_routers(model: PreTrainedModel) -> bool:
    """Return whether a weight of a router, or of an adapter on one, is trained."""
    routers = list(routers_of(model).values())
    ours = {id(parameter) for router in routers for parameter in router.parameters() if parameter.requires_grad}
    return bool(ours) or any(_wraps(module, routers) for module in model.modules())


def _wraps(module: nn.Module, routers: Sequence[nn.Module]) -> bool:
    """Return whether `module` is an adapter on a router, with something to train."""
    return any(getattr(module, "base_layer", None) is router for router in routers) and any(
        parameter.requires_grad for parameter in module.parameters()
    )
