"""Compute the loss of GRPO and its relatives from a surrogate, corrections, a KL term and a normalizer."""

from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric, token_mean
from rlqwen.algorithms.losses.calls import LossCall, Normalizer, settings_of
from rlqwen.algorithms.losses.correction import compare_with_sampler
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.reduction import Totals, sequence_mean
from rlqwen.config import GRPOConfig
from rlqwen.packing.batch import PackedBatch

SURROGATE_INPUTS = ("logp", "old_logp", "log_ratio", "ratio", "advantage", "lengths", "sequence")


class GRPOLoss:
    """Compute the loss that a GRPOConfig describes.

    Let r = exp(logp - old_logp) be the ratio, A the advantage of the token's completion, and w the rollout correction. The
    loss is the sum over tokens of

        normalizer * (w * surrogate(r, A) + beta * KL(policy || reference)) - entropy_coef * entropy / number of tokens

    With `importance_sampling_level="sequence"`, r is exp(mean over the completion of logp - old_logp) (GSPO, arXiv
    2507.18071). The choices are in rlqwen.algorithms.losses.surrogates and rlqwen.algorithms.normalizers.
    """

    def __init__(self, config: GRPOConfig) -> None:
        """Find the surrogate and the normalizer; raise ConfigError if one is unknown or needs an unknown input."""
        settings = settings_of(config)
        self._config = config
        self._surrogate = LossCall(
            config.surrogate, inputs=SURROGATE_INPUTS, settings=settings, arguments=config.loss_args
        )
        self._normalizer = Normalizer(config.normalizer, settings)

    def __call__(
        self, logp_N: Tensor, entropy_N: Tensor | None, batch: PackedBatch, totals: Totals
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Return the micro-batch's share of the update's loss, and metrics.

        Args:
            logp_N: (N,) logprobs under the policy, with gradient.
            entropy_N: (N,) entropies; with gradient if `entropy_coef` is set.
            batch: has the column `advantage` (per sequence) and, per token, `sampler_logp`, `old_logp` if this is not the
                first update on the rollout, and `ref_logp` if `beta` is set.
            totals: counts over the whole update.
        """
        config = self._config
        logp_N = logp_N.float()
        old_logp_N = batch.per_token.get("old_logp", logp_N.detach())
        log_ratio_N = logp_N - old_logp_N
        if config.importance_sampling_level == "sequence":
            log_ratio_N = sequence_mean(log_ratio_N, batch)[batch.sequence_N]
        ratio_N = log_ratio_N.exp()
        loss_N, metrics = self._surrogate(
            {
                "logp": logp_N,
                "old_logp": old_logp_N,
                "log_ratio": log_ratio_N,
                "ratio": ratio_N,
                "advantage": batch.per_sequence["advantage"][batch.sequence_N],
                "lengths": batch.lengths_S,
                "sequence": batch.sequence_N,
            }
        )
        correction_N, compared = compare_with_sampler(old_logp_N, batch, config)
        metrics |= compared
        if correction_N is not None:
            loss_N = loss_N * correction_N
        if config.beta:
            kl_N = kl_divergence(logp_N, batch.per_token["ref_logp"], config.kl_estimator)
            metrics["kl"] = token_mean(kl_N)
            loss_N = loss_N + config.beta * (kl_N * ratio_N if config.use_bias_correction_kl else kl_N)
        loss = (loss_N * self._normalizer(batch, totals)).sum()
        if entropy_N is not None:
            metrics["entropy"] = token_mean(entropy_N)
            if config.entropy_coef:
                loss = loss - config.entropy_coef * entropy_N.sum() / max(totals.tokens, 1.0)
        return loss, metrics
