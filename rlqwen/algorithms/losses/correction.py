"""Correction for a sampler whose distribution is not the trainer's."""

import torch
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, token_mean
from rlqwen.algorithms.losses.reduction import sequence_sum
from rlqwen.config import OnlineConfig
from rlqwen.packing.batch import PackedBatch


def compare_with_sampler(
    old_logp_N: Tensor, batch: PackedBatch, config: OnlineConfig
) -> tuple[Tensor | None, dict[str, Metric]]:
    """Return weights that correct for the sampler (None if off), and sums over tokens for the metrics.

    `old_logp_N`: the policy's before the update. They and the sampler's are compared as what they are of: the same
    distribution, truncated the same way (the column `log_kept`). Where the sampler also shaped it otherwise, such as by a
    penalty on what was written before, there is nothing to compare, and so neither weights nor metrics.
    """
    if "sampler_logp" not in batch.per_token or config.uncomparable:
        return None, {}
    logp_N = old_logp_N.detach()
    if config.truncation is not None:
        logp_N = logp_N - batch.per_token["log_kept"]
    metrics = {"sampling/logp_gap": token_mean((logp_N - batch.per_token["sampler_logp"]).abs())}
    if not config.vllm_importance_sampling_correction:
        return None, metrics
    weights_N = rollout_correction(logp_N, batch, config)
    return weights_N, metrics | {"sampling/correction": token_mean(weights_N)}


def rollout_correction(logp_N: Tensor, batch: PackedBatch, config: OnlineConfig) -> Tensor:
    """Return (N,) weights that correct for the difference between the sampler's and the trainer's distributions
    (truncated importance sampling, https://fengyao.notion.site/off-policy-rl; masking, arXiv 2510.18855).

    The ratio exp(logp - sampler_logp), of each token or of the whole completion, is truncated to
    [clip_min, clip_max], or set to 0 outside of it. `logp_N` is the policy's before the update, without gradient, of a
    distribution truncated as the sampler's.
    """
    log_ratio_N = logp_N.detach() - batch.per_token["sampler_logp"]
    level, action = config.vllm_importance_sampling_mode.split("_")
    if level == "sequence":
        log_ratio_N = sequence_sum(log_ratio_N, batch)[batch.sequence_N]
    ratio_N = log_ratio_N.exp()
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if action == "truncate":
        return ratio_N if low is None and high is None else ratio_N.clamp(min=low, max=high)
    outside_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    if high is not None:
        outside_N |= ratio_N > high
    if low is not None:
        outside_N |= ratio_N < low
    return ratio_N.masked_fill(outside_N, 0.0)
