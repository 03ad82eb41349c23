"""Compute the loss of DPO and its relatives: a weighted sum of the losses that the config names."""

import torch
from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric
from rlqwen.algorithms.losses.calls import LossCall, settings_of
from rlqwen.algorithms.losses.preference.answers import Answers, AnswerTotals
from rlqwen.algorithms.losses.preference.paired import score
from rlqwen.config import DPOConfig
from rlqwen.config.dpo import UNPAIRED

PAIR_INPUTS = ("chosen", "rejected", "chosen_score", "rejected_score")


class PreferenceLoss:
    """Compute the loss that a DPOConfig describes: the sum of the named losses, weighted by `loss_weights`.

    A loss of pairs is averaged over the update's pairs, and `kto` over its answers. `sft`, and the term that `cpo` and
    `orpo` add, is the mean negative log-likelihood per token of the good answers.
    """

    def __init__(self, config: DPOConfig) -> None:
        """Find the losses of pairs; raise ConfigError if one is unknown or needs an unknown input."""
        self._config = config
        settings = settings_of(config)
        self._pair_losses = {
            name: LossCall(name, inputs=PAIR_INPUTS, settings=settings, arguments=config.loss_args.get(name))
            for name in config.loss_type
            if name not in UNPAIRED
        }

    def __call__(
        self, answers: Answers, totals: AnswerTotals, *, kl: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Metric]]:
        """Return the micro-batch's share of the update's loss, shares of built-in metrics, and the metrics of plugins.

        The shares of all micro-batches add up to means over the update.

        Args:
            answers: answers of the micro-batch, or of the whole update if a loss ranks its pairs (`aot`, `aot_unpaired`).
            kl: for `kto`, an estimate of the KL divergence from the reference, without gradient; see `kto_kl`.
        """
        config, good, bad = self._config, answers.good, answers.bad
        likelihood_weight = {"sft": 1.0, "cpo": config.cpo_alpha, "orpo": 1.0}
        loss = answers.logp_S.new_zeros(())
        shares: dict[str, Tensor] = {}
        metrics: dict[str, Metric] = {}
        for name, weight in config.weighted_losses:
            part = loss.new_zeros(())
            if name == "kto":
                assert kl is not None, "kto needs an estimate of the KL divergence"
                part = part + kto(answers, config, kl).sum() / max(totals.answers, 1)
            if name in self._pair_losses:
                losses_B, found = self._pair_losses[name](self._inputs(good, bad))
                metrics |= found
                if config.use_weighting:
                    losses_B = losses_B * (good.log_weight_S + bad.log_weight_S).exp()
                part = part + losses_B.sum() / max(totals.pairs, 1)
            if likelihood_weight.get(name):
                part = part - likelihood_weight[name] * good.plain_logp_S.sum() / max(totals.good_tokens, 1)
            if len(config.loss_type) > 1:
                shares[f"loss/{name}"] = part.detach()
            loss = loss + weight * part
        return loss, shares | _reward_metrics(good, bad, config, totals), metrics

    def _inputs(self, good: Answers, bad: Answers) -> dict[str, Answers | Tensor]:
        divergence, alpha = self._config.f_divergence_type, self._config.f_alpha_divergence_coef
        return {
            "chosen": good,
            "rejected": bad,
            "chosen_score": score(good, divergence, alpha),
            "rejected_score": score(bad, divergence, alpha),
        }


def kto(answers: Answers, config: DPOConfig, kl: Tensor) -> Tensor:
    """Return the (S,) losses of single answers (KTO, arXiv 2402.01306, eq. 7).

    With r the log-ratio of policy and reference: desirable_weight (1 - sigma(beta (r - kl))) for good answers,
    undesirable_weight (1 - sigma(beta (kl - r))) for bad answers.
    """
    gain = config.beta * (answers.log_ratio_S - kl)
    return torch.where(
        answers.labels_S,
        config.desirable_weight * torch.sigmoid(-gain),
        config.undesirable_weight * torch.sigmoid(gain),
    )


def kto_kl(kl_answers: Answers) -> Tensor:
    """Return KTO's estimate of the KL divergence: the mean log-ratio of prompts with the answers of other prompts, at least 0."""
    return kl_answers.log_ratio_S.mean().clamp(min=0).detach()


@torch.no_grad()
def _reward_metrics(good: Answers, bad: Answers, config: DPOConfig, totals: AnswerTotals) -> dict[str, Tensor]:
    """Return shares of the metrics of implicit rewards and log-probabilities."""
    shares: dict[str, Tensor] = {}
    rewards = {"chosen": _rewards(good, config), "rejected": _rewards(bad, config)}
    for name, side, count in (("chosen", good, totals.good), ("rejected", bad, totals.bad)):
        if count:
            shares[f"rewards/{name}"] = rewards[name].sum() / count
            shares[f"logps/{name}"] = side.logp_S.sum() / count
    if totals.good and totals.bad:
        shares["rewards/margins"] = shares["rewards/chosen"] - shares["rewards/rejected"]
    if totals.pairs:
        shares["rewards/accuracies"] = (rewards["chosen"] > rewards["rejected"]).float().sum() / totals.pairs
    return shares


def _rewards(answers: Answers, config: DPOConfig) -> Tensor:
    """Return the implicit rewards as the first loss other than `sft` defines them."""
    main = next((name for name in config.loss_type if name != "sft"), "sft")
    return config.beta * (answers.mean_logp_S if main in ("simpo", "orpo") else answers.log_ratio_S)
