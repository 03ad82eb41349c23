"""Estimate advantages from rewards: pure functions of tensors.

An estimator of groups (`group`, `rloo`, `reinforce_pp`) is called with what its signature names: `rewards` and `lengths`,
both (P, G), settings of the trainer's config, and the recipe's `advantage_args`.

Shapes: P prompts, G completions per prompt. A missing reward (see rlqwen.rewards.total_reward) is NaN: it is left out of every
mean and deviation, and its advantage is 0.
"""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it; TRL's value."""


def group(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Compare each completion with the mean of its group (GRPO, arXiv 2402.03300): A = r - mean(group).

    `scale_rewards` divides by the deviation of the `group`, of the whole `batch`, or by nothing (`none`; Dr. GRPO, arXiv
    2503.20783).

    Args:
        rewards: (P, G) float, NaN if a reward is missing.

    Returns:
        (P, G) float32, 0 if the reward is missing.
    """
    return _present(_scaled(_centered(rewards), rewards, scale_rewards), rewards)


def rloo(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Compare each completion with the mean of the others in its group (RLOO, arXiv 2402.14740).

    A = r - mean(others) = (r - mean(group)) * G / (G - 1). Arguments and result as for `group`.
    """
    count = (~rewards.isnan()).sum(1, keepdim=True)
    return _present(_scaled(_centered(rewards) * count / (count - 1).clamp(min=1), rewards, scale_rewards), rewards)


def reinforce_pp(rewards: Tensor) -> Tensor:
    """Compare with the group mean, then whiten over the batch (REINFORCE++-baseline, arXiv 2501.03262).

    Arguments and result as for `group`; `scale_rewards` does not apply.
    """
    centered = _centered(rewards)
    centered = centered - centered.nanmean()
    return _present(centered / (nan_std(centered.flatten()[None]) + EPSILON), rewards)


def _centered(rewards_PG: Tensor) -> Tensor:
    rewards = rewards_PG.float()
    centered = rewards - rewards.nanmean(1, keepdim=True)
    # The mean of equal numbers may round to another one, and dividing by a deviation near 0 would blow that up.
    return centered.masked_fill(~rewards.isnan() & ~carries_signal(rewards)[:, None], 0.0)


def _scaled(centered_PG: Tensor, rewards_PG: Tensor, scale: str) -> Tensor:
    rewards = rewards_PG.float()
    if scale == "group":
        return centered_PG / (nan_std(rewards) + EPSILON)
    if scale == "batch":
        return centered_PG / (nan_std(rewards.flatten()[None]) + EPSILON)
    return centered_PG


def _present(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return torch.where(rewards_PG.isnan(), 0.0, advantages_PG)


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
