"""A surrogate for GRPO and PPO, and a loss of pairs for DPO."""

from typing import Any

import torch
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, maximum, token_mean


def soft_clip(ratio: Tensor, advantage: Tensor, epsilon: float) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Bend the ratio smoothly instead of clipping it."""
    bent = 1 + epsilon * torch.tanh((ratio - 1) / epsilon)
    return -bent * advantage, {"example/ratio": token_mean(ratio), "example/ratio_max": maximum(ratio)}


def nearer(chosen_score: Tensor, rejected_score: Tensor, beta: float, target: float = 1.0) -> Any:
    """Pull the margin of each pair to a target."""
    return (beta * (chosen_score - rejected_score) - target).square()
