"""Reward modelling from pairs."""

import torch.nn.functional as F
from torch import Tensor

from rlqwen.algorithms.losses.reduction import Metrics, Totals


def reward_loss(
    chosen_S: Tensor, rejected_S: Tensor, margin_S: Tensor, totals: Totals, *, center_coefficient: float | None = None
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry: mean of -log sigmoid(r_chosen - r_rejected - margin) over the update's pairs.

    Without margins, Ouyang et al., arXiv 2203.02155, eq. 1; with them, Llama 2, arXiv 2307.09288, eq. 2.
    `center_coefficient` adds its multiple of the mean of (r_chosen + r_rejected)^2, which keeps rewards around 0
    (arXiv 2312.09244, eq. 2).

    Args:
        chosen_S, rejected_S: (S,) rewards of the two sides of each pair, with gradient.
        margin_S: (S,) 0 where the data has none.
        totals: `sequences` counts pairs.

    Returns:
        The scalar loss, and sums over pairs for the metrics.
    """
    chosen_S, rejected_S = chosen_S.float(), rejected_S.float()
    gap_S = chosen_S - rejected_S
    loss_S = -F.logsigmoid(gap_S - margin_S)
    if center_coefficient:
        loss_S = loss_S + center_coefficient * (chosen_S + rejected_S).square()
    sums: Metrics = {
        "rewards/chosen": chosen_S.detach().sum(),
        "rewards/rejected": rejected_S.detach().sum(),
        "rewards/margins": gap_S.detach().sum(),
        "rewards/accuracies": (gap_S.detach() > 0).float().sum(),
    }
    return loss_S.sum() / max(totals.sequences, 1.0), sums
