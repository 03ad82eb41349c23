"""GRPO and its relatives."""

import torch
from torch import Tensor

from rlqwen.algorithms.losses.clipping import clipped_surrogate
from rlqwen.algorithms.losses.correction import compare_with_sampler
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.reduction import Metrics, Totals, sequence_mean
from rlqwen.config import GRPOConfig
from rlqwen.packing.batch import PackedBatch


def grpo_loss(
    logp_N: Tensor, entropy_N: Tensor | None, batch: PackedBatch, config: GRPOConfig, totals: Totals
) -> tuple[Tensor, Metrics]:
    """The clipped policy-gradient loss of GRPO and its relatives.

    With ratio r = exp(logp - old_logp), advantage A of the token's completion, and w the rollout correction:

    - surrogate: -w * min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), where r is first capped at `delta` if given
      (dual clip, arXiv 1912.09729); GRPO, arXiv 2402.03300; separate upper clip, DAPO, arXiv 2503.14476;
    - `cispo`: -w * stop_gradient(min(r, epsilon_high)) A logp (MiniMax-M1, arXiv 2506.13585);
    - `importance_sampling_level="sequence"`: r is exp(mean over the completion of logp - old_logp)
      (GSPO, arXiv 2507.18071).

    The sum over tokens is divided by what `loss_type` says:

    - `grpo`: each completion's own length, then the number of completions;
    - `dapo`, `cispo`: the number of tokens; `bnpo` too: over a whole update, they are the same;
    - `dr_grpo`: the number of completions times `max_completion_length` (arXiv 2503.20783).

    `beta` adds beta * KL(policy || reference) by the estimator of `kl_estimator`; `entropy_coef` takes
    entropy_coef * mean entropy off the loss.

    Args:
        logp_N: (N,) logprobs under the policy, with gradient.
        entropy_N: (N,) entropies; with gradient where `entropy_coef` is set.

    Returns:
        The scalar loss, and sums over tokens or sequences for the metrics.
    """
    logp_N = logp_N.float()
    old_logp_N = batch.per_token.get("old_logp", logp_N.detach())
    advantage_N = batch.per_sequence["advantage"][batch.sequence_N]
    log_ratio_N = logp_N - old_logp_N
    if config.importance_sampling_level == "sequence":
        log_ratio_N = sequence_mean(log_ratio_N, batch)[batch.sequence_N]
    ratio_N = log_ratio_N.exp()

    low, high = config.epsilon, config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo":
        loss_N = -ratio_N.detach().clamp(max=high) * advantage_N * logp_N
        clipped_N = (ratio_N > high) & (advantage_N > 0)
    else:
        loss_N, clipped_N = clipped_surrogate(ratio_N, advantage_N, low=low, high=high, delta=config.delta)
    metrics: Metrics = {"clip_ratio": clipped_N.float().sum()}

    correction_N, figures = compare_with_sampler(old_logp_N, batch, config)
    metrics |= figures
    if correction_N is not None:
        loss_N = loss_N * correction_N
    if config.beta:
        kl_N = kl_divergence(logp_N, batch.per_token["ref_logp"], config.kl_estimator)
        metrics["kl"] = kl_N.detach().sum()
        loss_N = loss_N + config.beta * (kl_N * ratio_N if config.use_bias_correction_kl else kl_N)
    loss = (loss_N * token_weights(batch, config, totals)).sum()
    if entropy_N is not None:
        metrics["entropy"] = entropy_N.detach().sum()
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy_N.sum() / max(totals.tokens, 1.0)
    return loss, metrics


def token_weights(batch: PackedBatch, config: GRPOConfig, totals: Totals) -> Tensor:
    """(N,) what each token's loss is multiplied by, so that the sum over the update is the loss type's mean."""
    if config.loss_type == "grpo":
        return (1.0 / (batch.lengths_S.clamp(min=1) * max(totals.sequences, 1.0)))[batch.sequence_N]
    count = totals.tokens
    if config.loss_type == "dr_grpo":
        count = totals.sequences * config.max_completion_length
    return torch.full_like(batch.sequence_N, 1.0 / max(count, 1.0), dtype=torch.float32)
