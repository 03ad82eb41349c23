"""Compute PPO's losses of the policy and the critic: means over the update's tokens."""

import torch
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, token_mean
from rlqwen.algorithms.losses.calls import LossCall, settings_of
from rlqwen.algorithms.losses.correction import compare_with_sampler
from rlqwen.algorithms.losses.grpo import SURROGATE_INPUTS
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.reduction import Totals
from rlqwen.config import PPOConfig
from rlqwen.packing.batch import PackedBatch


class PPOPolicyLoss:
    """Compute the policy's loss: a surrogate, by default the clipped one (arXiv 1707.06347, eq. 7), with token advantages.

    The rollout correction weights tokens, because the sampler's distribution differs from the trainer's.
    `kl_penalty="loss"` adds kl_coef * KL(policy || reference). `entropy_coef` subtracts entropy_coef * entropy.
    """

    def __init__(self, config: PPOConfig) -> None:
        """Find the surrogate; raise ConfigError if it is unknown or needs an unknown input."""
        settings = settings_of(config) | {"epsilon": config.cliprange}
        self._config = config
        self._surrogate = LossCall(
            config.loss_type, inputs=SURROGATE_INPUTS, settings=settings, arguments=config.loss_args
        )

    def __call__(
        self, logp_N: Tensor, entropy_N: Tensor | None, batch: PackedBatch, totals: Totals, *, kl_coef: float
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the micro-batch's share of the update's loss, and metrics.

        Args:
            logp_N: (N,) logprobs under the policy, with gradient.
            entropy_N: (N,) entropies; with gradient if `entropy_coef` is set.
            batch: has the columns per token `old_logp`, `advantage`, `sampler_logp`, and `ref_logp` if the loss has a KL
                term.
        """
        config = self._config
        logp_N = logp_N.float()
        old_logp_N = batch.per_token["old_logp"]
        log_ratio_N = logp_N - old_logp_N
        loss_N, metrics = self._surrogate(
            {
                "logp": logp_N,
                "old_logp": old_logp_N,
                "log_ratio": log_ratio_N,
                "ratio": log_ratio_N.exp(),
                "advantage": batch.per_token["advantage"],
                "lengths": batch.lengths_S,
                "sequence": batch.sequence_N,
            }
        )
        metrics["policy/approx_kl"] = Metric(log_ratio_N.detach().square().sum() / 2, "token_mean")
        correction_N, compared = compare_with_sampler(old_logp_N, batch, config)
        metrics |= compared
        if correction_N is not None:
            loss_N = loss_N * correction_N
        if config.kl_penalty == "loss" and kl_coef:
            loss_N = loss_N + kl_coef * kl_divergence(logp_N, batch.per_token["ref_logp"], config.kl_estimator)
        if entropy_N is not None:
            metrics["entropy"] = token_mean(entropy_N)
            if config.entropy_coef:
                loss_N = loss_N - config.entropy_coef * entropy_N
        return loss_N.sum() / max(totals.tokens, 1.0), metrics


def ppo_value_loss(
    values_N: Tensor, batch: PackedBatch, config: PPOConfig, totals: Totals
) -> tuple[Tensor, dict[str, Metric]]:
    """Return half the squared error of the critic's values, with clipping, and metrics.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) with c = `cliprange_value`, as in OpenAI's baselines and
    TRL 1.9. If `cliprange_value` is 0, nothing is clipped.

    Args:
        values_N: (N,) the critic's values, with gradient.
        batch: has the columns per token `return` and, if values are clipped, `old_value`.
    """
    values_N, returns_N = values_N.float(), batch.per_token["return"]
    error_N = (values_N - returns_N).square()
    clipped_N = torch.zeros_like(error_N, dtype=torch.bool)
    if config.cliprange_value:
        old_N, reach = batch.per_token["old_value"], config.cliprange_value
        clipped_error_N = (values_N.clamp(old_N - reach, old_N + reach) - returns_N).square()
        clipped_N = clipped_error_N > error_N
        error_N = torch.max(error_N, clipped_error_N)
    return 0.5 * error_N.sum() / max(totals.tokens, 1.0), {"critic/clip_ratio": token_mean(clipped_N)}
