"""Proximal policy optimisation: one loss for the policy, one for the critic. Both are means over the update's tokens."""

import torch
from torch import Tensor

from rlqwen.algorithms.losses.clipping import clipped_surrogate
from rlqwen.algorithms.losses.correction import compare_with_sampler
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.reduction import Metrics, Totals
from rlqwen.config import PPOConfig
from rlqwen.packing.batch import PackedBatch


def ppo_policy_loss(
    logp_N: Tensor, entropy_N: Tensor | None, batch: PackedBatch, config: PPOConfig, totals: Totals, *, kl_coef: float
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7) with an advantage a token, over the update's tokens.

    `kl_penalty="loss"` adds kl_coef * KL(policy || reference); `entropy_coef` takes entropy_coef * entropy off. The
    rollout correction weighs tokens for the sampler's distribution not being the trainer's.

    Args:
        logp_N: (N,) logprobs under the policy, with gradient.
        entropy_N: (N,) entropies; with gradient where `entropy_coef` is set.

    Returns:
        The scalar loss, and sums over tokens for the metrics.
    """
    logp_N = logp_N.float()
    old_logp_N = batch.per_token["old_logp"]
    log_ratio_N = logp_N - old_logp_N
    ratio_N = log_ratio_N.exp()
    loss_N, clipped_N = clipped_surrogate(
        ratio_N, batch.per_token["advantage"], low=config.cliprange, high=config.cliprange
    )
    metrics: Metrics = {
        "clip_ratio": clipped_N.float().sum(),
        "policy/approx_kl": log_ratio_N.detach().square().sum() / 2,
    }
    correction_N, figures = compare_with_sampler(old_logp_N, batch, config)
    metrics |= figures
    if correction_N is not None:
        loss_N = loss_N * correction_N
    if config.kl_penalty == "loss" and kl_coef:
        loss_N = loss_N + kl_coef * kl_divergence(logp_N, batch.per_token["ref_logp"], config.kl_estimator)
    if entropy_N is not None:
        metrics["entropy"] = entropy_N.detach().sum()
        if config.entropy_coef:
            loss_N = loss_N - config.entropy_coef * entropy_N
    return loss_N.sum() / max(totals.tokens, 1.0), metrics


def ppo_value_loss(values_N: Tensor, batch: PackedBatch, config: PPOConfig, totals: Totals) -> tuple[Tensor, Metrics]:
    """Half the squared error to the returns; the worse of the value and of the value clipped around the old one.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), c = `cliprange_value`; OpenAI's baselines, and TRL 1.9.
    0 for `cliprange_value` clips nothing.

    Args:
        values_N: (N,) the critic's values, with gradient.
    """
    values_N, returns_N = values_N.float(), batch.per_token["return"]
    error_N = (values_N - returns_N).square()
    clipped_N = torch.zeros_like(error_N, dtype=torch.bool)
    if config.cliprange_value:
        old_N, reach = batch.per_token["old_value"], config.cliprange_value
        clipped_error_N = (values_N.clamp(old_N - reach, old_N + reach) - returns_N).square()
        clipped_N = clipped_error_N > error_N
        error_N = torch.max(error_N, clipped_error_N)
    return 0.5 * error_N.sum() / max(totals.tokens, 1.0), {"critic/clip_ratio": clipped_N.float().sum()}
