"""Compute the clipped surrogate that PPO and GRPO share."""

import torch
from torch import Tensor


def clipped_surrogate(
    ratio_N: Tensor, advantage_N: Tensor, *, low: float, high: float, delta: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the losses -min(r A, clip(r, 1 - low, 1 + high) A), and which tokens get no gradient because of the clip.

    PPO, arXiv 1707.06347, eq. 7. A separate upper limit is from DAPO, arXiv 2503.14476. `delta` caps r in the unclipped
    term (dual clip, arXiv 1912.09729).

    Args:
        ratio_N: (N,) ratio of each token's probabilities under the policy and under the policy before the update.
        advantage_N: (N,) advantages.

    Returns:
        (N,) losses and (N,) bool.
    """
    capped_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    loss_N = -torch.min(capped_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N)
    clipped_N = ((ratio_N < 1 - low) & (advantage_N < 0)) | ((ratio_N > 1 + high) & (advantage_N > 0))
    return loss_N, clipped_N
