"""Define surrogates of the policy-gradient objective: one value per token.

A surrogate is called with those of these inputs that its signature names:

- `logp`, `old_logp`: (N,) logprobs of the policy, with gradient, and of the policy before the first update.
- `ratio`, `log_ratio`: (N,) ratio of the probabilities under the policy and the old policy, and its logarithm; with
  `importance_sampling_level: sequence` the geometric mean over the completion.
- `advantage`: (N,) advantages.
- `lengths`: (S,) tokens of each completion; `sequence`: (N,) index of the completion to which each token belongs.
- settings of the trainer's config, such as `epsilon`, and the arguments of the recipe's `loss_args`.

It returns (N,) losses, or a tuple of these and metrics.
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
    """Clip the ratio, so that an update does not move the policy far (PPO, arXiv 1707.06347, eq. 7).

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A). `epsilon_high` is from DAPO (arXiv 2503.14476). `delta` caps r in
    the unclipped term (dual clip, arXiv 1912.09729).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    loss_N, clipped_N = clipped_surrogate(ratio, advantage, low=epsilon, high=high, delta=delta)
    return loss_N, {"clip_ratio": token_mean(clipped_N)}


def cispo(
    logp: Tensor, ratio: Tensor, advantage: Tensor, epsilon: float, epsilon_high: float | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Cap the weight of a token's policy gradient instead of removing the gradient (CISPO, arXiv 2506.13585).

    -stop_gradient(min(r, epsilon_high)) A logp.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    loss_N = -ratio.detach().clamp(max=high) * advantage * logp
    return loss_N, {"clip_ratio": token_mean((ratio > high) & (advantage > 0))}
