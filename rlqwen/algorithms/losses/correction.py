"""Correct for the difference between the sampler's distribution and the trainer's."""

import torch
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, token_mean
from rlqwen.algorithms.losses.reduction import sequence_sum
from rlqwen.config import OnlineConfig
from rlqwen.packing.batch import PackedBatch


def compare_with_sampler(
    old_logp_N: Tensor, batch: PackedBatch, config: OnlineConfig
) -> tuple[Tensor | None, dict[str, Metric]]:
    """Return (N,) weights that correct for the sampler (None if the correction is off), and metrics of the difference.

    `old_logp_N`: (N,) logprobs of the policy before the update. The sampler's logprobs are of a distribution truncated by
    top-k, top-p or min-p, so the policy's are renormalized in the same way (by the column `log_kept`). If the sampler also
    changed its distribution otherwise, for example by a repetition penalty, the two cannot be compared, and there are
    neither weights nor metrics.
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
    """Return (N,) importance weights of the trainer's distribution over the sampler's.

    The ratio exp(logp - sampler_logp) of each token, or of the whole completion, is truncated to [clip_min, clip_max]
    (truncated importance sampling, https://fengyao.notion.site/off-policy-rl), or set to 0 outside of it (masking, arXiv
    2510.18855). `logp_N`: (N,) logprobs of the policy before the update, truncated and renormalized as the sampler's are.
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
