"""Define the losses of reward models: one value per pair.

A loss is called with those of these inputs that its signature names: `chosen`, `rejected` (B,), rewards of the two
answers with gradient; `margin` (B,), 0 if the data has none; settings of the trainer's config; and the recipe's
`loss_args`.
"""

import torch.nn.functional as F
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, sequence_mean


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor, center_rewards_coefficient: float | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Return -log sigmoid(r_chosen - r_rejected - margin).

    Without margins: Ouyang et al., arXiv 2203.02155, eq. 1; with margins: Llama 2, arXiv 2307.09288, eq. 2.
    `center_rewards_coefficient` * (r_chosen + r_rejected)^2 is added, which keeps rewards near 0 (arXiv 2312.09244, eq. 2).
    """
    chosen, rejected = chosen.float(), rejected.float()
    gap = chosen - rejected
    loss = -F.logsigmoid(gap - margin)
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    metrics = {
        "rewards/chosen": sequence_mean(chosen),
        "rewards/rejected": sequence_mean(rejected),
        "rewards/margins": sequence_mean(gap),
        "rewards/accuracies": sequence_mean(gap.detach() > 0),
    }
    return loss, metrics
