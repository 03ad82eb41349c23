"""From rewards to advantages: pure functions of tensors.

Shapes: P prompts, G completions a prompt. A missing reward is NaN: it takes no part in any mean or deviation, and its
advantage is 0.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["group", "rloo", "reinforce_pp"]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4
"""Added to a deviation before dividing by it; TRL's value."""


def group_advantages(rewards_PG: Tensor, *, estimator: Estimator = "group", scale: Scale = "group") -> Tensor:
    """Advantages of each completion against its own group.

    - `group`: A = r - mean(group); GRPO, arXiv 2402.03300.
    - `rloo`: A = r - mean(the group's others) = (r - mean(group)) * G / (G - 1); arXiv 2402.14740.
    - `reinforce_pp`: the group baseline, then whitened over the batch whatever `scale` says;
      REINFORCE++-baseline, arXiv 2501.03262.

    `scale` divides by the deviation of the group, of the whole batch, or by nothing (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards_PG: (P, G) float, NaN where a reward is missing.

    Returns:
        (P, G) float32, 0 where the reward is missing.
    """
    rewards = rewards_PG.float()
    present = ~rewards.isnan()
    count = present.sum(1, keepdim=True)
    centred = rewards - rewards.nanmean(1, keepdim=True)
    # The mean of equal numbers may round to another one, and dividing by a deviation near 0 would blow that up.
    centred = centred.masked_fill(present & ~carries_signal(rewards)[:, None], 0.0)
    if estimator == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    if estimator == "reinforce_pp":
        centred = centred - centred.nanmean()
        centred = centred / (nan_std(centred.flatten()[None]) + EPSILON)
    elif scale == "group":
        centred = centred / (nan_std(rewards) + EPSILON)
    elif scale == "batch":
        centred = centred / (nan_std(rewards.flatten()[None]) + EPSILON)
    return torch.where(present, centred, 0.0)


def nan_std(values: Tensor) -> Tensor:
    """(P, 1) sample standard deviation (Bessel's correction) of each row's values that are not NaN; 0 below two."""
    present = ~values.isnan()
    count = present.sum(1, keepdim=True)
    squares = (values - values.nanmean(1, keepdim=True)).square()
    return (squares.nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def carries_signal(rewards_PG: Tensor) -> Tensor:
    """(P,) bool: whether a group's rewards differ, so that its advantages are not all zero."""
    low = torch.where(rewards_PG.isnan(), torch.inf, rewards_PG).amin(1)
    high = torch.where(rewards_PG.isnan(), -torch.inf, rewards_PG).amax(1)
    return high > low


def soft_overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in [-1, 0].

    0 up to `max_length - cache` tokens, then linear down to -1 at `max_length`.
    """
    return -min(1.0, max(0.0, (length - (max_length - cache)) / cache))
