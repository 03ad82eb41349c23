"""Correction for a sampler whose distribution is not the trainer's."""

import torch
from torch import Tensor

from rlqwen.batch import PackedBatch
from rlqwen.config import OnlineConfig
from rlqwen.losses.reduction import required, sequence_sum


def rollout_correction(logp_N: Tensor, batch: PackedBatch, config: OnlineConfig) -> Tensor:
    """(N,) weights that correct for the sampler's distribution not being the trainer's (truncated importance
    sampling, https://fengyao.notion.site/off-policy-rl; masking, arXiv 2510.18855).

    The ratio exp(logp - sampler_logp), of each token or of the whole completion, is truncated to
    [clip_min, clip_max], or set to 0 outside of it. `logp_N` is the policy's before the update, without gradient.
    """
    log_ratio_N = logp_N.detach() - required(batch.sampler_logp_N)
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
