"""From rewards to advantages: pure functions of tensors.

Shapes: P prompts, G completions a prompt. A missing reward (rlqwen.rewards.total_reward says when it is) is NaN: it takes no
part in any mean or deviation, and its advantage is 0.
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


def token_rewards(scores_S: Tensor, kl_N: Tensor, lengths_S: Tensor, *, kl_coef: float) -> Tensor:
    """(N,) rewards token by token: -kl_coef * KL everywhere, and a sequence's score on its last token.

    Ziegler et al., arXiv 1909.08593, eq. 2.

    Args:
        scores_S: (S,) one a sequence.
        kl_N: (N,) estimates of the KL to the reference, sequence after sequence.
        lengths_S: (S,) tokens of each sequence, at least 1.
    """
    rewards_N = -kl_coef * kl_N.float()
    last_S = lengths_S.long().cumsum(0) - 1
    return rewards_N.index_add(0, last_S, scores_S.float())


def gae(rewards_N: Tensor, values_N: Tensor, lengths_S: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), each sequence by itself.

    With delta_t = r_t + gamma V_{t+1} - V_t, where V is 0 after the last token:
    A_t = delta_t + gamma lam A_{t+1}, and the return is A_t + V_t.

    Args:
        rewards_N, values_N: (N,) token by token, sequence after sequence; the value is of what stands before the token.
        lengths_S: (S,) tokens of each sequence.

    Returns:
        (N,) advantages and (N,) returns, float32.
    """
    lengths = lengths_S.long()
    width = int(lengths.max()) if len(lengths) else 0
    is_token_SL = torch.arange(width, device=lengths.device) < lengths[:, None]
    rewards_SL = values_N.new_zeros(is_token_SL.shape, dtype=torch.float32).masked_scatter(
        is_token_SL, rewards_N.float()
    )
    values_SL = torch.zeros_like(rewards_SL).masked_scatter(is_token_SL, values_N.float())
    next_values_SL = torch.cat([values_SL[:, 1:], torch.zeros_like(values_SL[:, :1])], dim=1)
    delta_SL = rewards_SL + gamma * next_values_SL - values_SL
    advantages_SL = torch.zeros_like(delta_SL)
    running_S = torch.zeros_like(delta_SL[:, 0])
    for t in reversed(range(width)):
        # Padding comes after a sequence's end and is all zero, so nothing flows back from it.
        running_S = delta_SL[:, t] + gamma * lam * running_S
        advantages_SL[:, t] = running_S
    advantages_N = advantages_SL[is_token_SL]
    return advantages_N, advantages_N + values_N.float()


def whiten(values_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values of unit variance and, with `shift_mean`, mean 0; fewer than two stay as they are."""
    if len(values_N) < 2:
        return values_N
    mean = values_N.mean()
    whitened_N = (values_N - mean) * torch.rsqrt(values_N.var() + 1e-8)
    return whitened_N if shift_mean else whitened_N + mean
