"""Estimate advantages from rewards: pure functions of tensors.

An estimator of groups (`group`, `rloo`, `reinforce_pp`) is called with those of these inputs that its signature names:
`rewards` and `lengths`, both (P, G); settings of the trainer's config; and the recipe's `advantage_args`.

Shapes: P prompts, G completions per prompt. A missing reward (see rlqwen.rewards.total_reward) is NaN: means and
deviations leave it out, and its advantage is 0.
"""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to standard deviations before dividing by them; the value of TRL."""


def group(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Compare each completion with the mean of its group (GRPO, arXiv 2402.03300): A = r - mean(group).

    `scale_rewards`: divide by the standard deviation of the `group` or of the whole `batch`, or do not divide (`none`; Dr.
    GRPO, arXiv 2503.20783).

    Args:
        rewards: (P, G) float, NaN if a reward is missing.

    Returns:
        (P, G) float32, 0 if the reward is missing.
    """
    return _zero_if_missing(_scaled(_centered(rewards), rewards, scale_rewards), rewards)


def rloo(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Compare each completion with the mean of the others in its group (RLOO, arXiv 2402.14740).

    A = r - mean(others) = (r - mean(group)) * G / (G - 1). The arguments and the result are those of `group`.
    """
    count = (~rewards.isnan()).sum(1, keepdim=True)
    return _zero_if_missing(
        _scaled(_centered(rewards) * count / (count - 1).clamp(min=1), rewards, scale_rewards), rewards
    )


def reinforce_pp(rewards: Tensor) -> Tensor:
    """Subtract the mean of the group, then whiten over the batch (REINFORCE++-baseline, arXiv 2501.03262).

    The arguments and the result are those of `group`, without `scale_rewards`.
    """
    centered = _centered(rewards)
    centered = centered - centered.nanmean()
    return _zero_if_missing(centered / (nan_std(centered.flatten()[None]) + EPSILON), rewards)


def _centered(rewards_PG: Tensor) -> Tensor:
    rewards = rewards_PG.float()
    centered = rewards - rewards.nanmean(1, keepdim=True)
    # The mean of equal numbers may be rounded to another number, and dividing by a deviation near 0 would amplify that.
    return centered.masked_fill(~rewards.isnan() & ~carries_signal(rewards)[:, None], 0.0)


def _scaled(centered_PG: Tensor, rewards_PG: Tensor, scale: str) -> Tensor:
    rewards = rewards_PG.float()
    if scale == "group":
        return centered_PG / (nan_std(rewards) + EPSILON)
    if scale == "batch":
        return centered_PG / (nan_std(rewards.flatten()[None]) + EPSILON)
    return centered_PG


def _zero_if_missing(advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    return torch.where(rewards_PG.isnan(), 0.0, advantages_PG)


def nan_std(values: Tensor) -> Tensor:
    """Return the (P, 1) sample standard deviation of each row without its NaNs; 0 for fewer than two values."""
    present = ~values.isnan()
    count = present.sum(1, keepdim=True)
    squares = (values - values.nanmean(1, keepdim=True)).square()
    return (squares.nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def carries_signal(rewards_PG: Tensor) -> Tensor:
    """Return (P,) bool: whether the rewards of a group differ, so that its advantages are not all zero."""
    low = torch.where(rewards_PG.isnan(), torch.inf, rewards_PG).amin(1)
    high = torch.where(rewards_PG.isnan(), -torch.inf, rewards_PG).amax(1)
    return high > low


def soft_overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """Return the penalty on long completions of DAPO (arXiv 2503.14476, eq. 13), in [-1, 0].

    The penalty is 0 up to `max_length - cache` tokens, and then decreases linearly to -1 at `max_length` tokens.
    """
    return -min(1.0, max(0.0, (length - (max_length - cache)) / cache))


def token_rewards(scores_S: Tensor, kl_N: Tensor, lengths_S: Tensor, *, kl_coef: float) -> Tensor:
    """Return (N,) rewards per token: -kl_coef * KL, plus the score of the sequence on its last token.

    Ziegler et al., arXiv 1909.08593, eq. 2.

    Args:
        scores_S: (S,) one score per sequence.
        kl_N: (N,) estimates of the KL to the reference, one sequence after another.
        lengths_S: (S,) tokens of each sequence, at least 1.
    """
    rewards_N = -kl_coef * kl_N.float()
    last_S = lengths_S.long().cumsum(0) - 1
    return rewards_N.index_add(0, last_S, scores_S.float())


def gae(rewards_N: Tensor, values_N: Tensor, lengths_S: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Estimate advantages by generalized advantage estimation (GAE, arXiv 1506.02438).

    For each sequence, with delta_t = r_t + gamma V_{t+1} - V_t and V = 0 after the last token:
    A_t = delta_t + gamma lam A_{t+1}, and the return is A_t + V_t.

    Args:
        rewards_N: (N,) reward of each token, one sequence after another.
        values_N: (N,) the critic's value of the text before each token.
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
        # Padding comes after the end of a sequence and is all zero, so it does not change the advantages before it.
        running_S = delta_SL[:, t] + gamma * lam * running_S
        advantages_SL[:, t] = running_S
    advantages_N = advantages_SL[is_token_SL]
    return advantages_N, advantages_N + values_N.float()


def whiten(values_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale values to unit variance and, with `shift_mean`, to mean 0; return fewer than two values unchanged."""
    if len(values_N) < 2:
        return values_N
    mean = values_N.mean()
    whitened_N = (values_N - mean) * torch.rsqrt(values_N.var() + 1e-8)
    return whitened_N if shift_mean else whitened_N + mean
