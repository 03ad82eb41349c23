"""An advantage estimator that reads ranks, not rewards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlqwen.rewards.registry import Reward


def rank(rewards: Sequence[Reward]) -> Tensor:
    """Spread the completions of a group evenly between -1 and 1 by their rank."""
    ranks = rewards.argsort(dim=1).argsort(dim=1).float()
    return torch.where(rewards.isnan(), 0.0, 2 * ranks / max(rewards.shape[1] - 1, 1) - 1)
