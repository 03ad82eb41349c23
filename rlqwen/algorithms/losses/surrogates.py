"""Surrogates of the policy-gradient objective, one value per token.

A surrogate is called with what its signature names:

- `logp`, `old_logp`: (N,) logprobs of the policy, with gradient, and of the policy before the first update.
- `ratio`, `log_ratio`: (N,) the policy's probability over the old policy's; with `importance_sampling_level: sequence` the
  geometric mean over the completion.
- `advantage`: (N,).
- `lengths`: (S,) tokens of each completion; `sequence`: (N,) the completion that a token belongs to.
- settings of the trainer's config, such as `epsilon`, and the arguments of the recipe's `loss_args`.

It returns (N,) losses, or those and metrics.
"""

from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, token_mean
from rlqwen.algorithms.losses.clipping import clipped_surrogate


def clipped(
    ratio: Tensor,
    advantage: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """Clip the ratio where it would move the policy further than epsilon (PPO, arXiv 1707.06347, eq. 7).

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), where r is first capped at `delta` if given (dual clip, arXiv
    1912.09729); a separate upper clip is DAPO's, arXiv 2503.14476.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    loss_N, clipped_N = clipped_surrogate(ratio, advantage, low=epsilon, high=high, delta=delta)
    return loss_N, {"clip_ratio": token_mean(clipped_N)}


def cispo(
    logp: Tensor, ratio: Tensor, advantage: Tensor, epsilon: float, epsilon_high: float | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Cap the weight of a token's policy gradient, and keep the gradient (MiniMax-M1, arXiv 2506.13585).

    -stop_gradient(min(r, epsilon_high)) A logp.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    loss_N = -ratio.detach().clamp(max=high) * advantage * logp
    return loss_N, {"clip_ratio": token_mean((ratio > high) & (advantage > 0))}
