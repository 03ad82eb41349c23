"""The loss of DPO and its relatives: a weighted sum of the types that the config names."""

import torch
from torch import Tensor

from rlqwen.algorithms.losses.preference.answers import Answers, AnswerTotals
from rlqwen.algorithms.losses.preference.paired import PAIR_LOSSES
from rlqwen.algorithms.losses.reduction import Metrics
from rlqwen.config import DPOConfig


def preference_loss(
    answers: Answers, config: DPOConfig, totals: AnswerTotals, *, kl: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """The micro-batch's share of the update's loss.

    Each type is a mean over the update's pairs (`kto`: over its answers; `sft`, and what `cpo` and `orpo` add: minus
    the mean log-likelihood of a token of the good answers), and the types are added with `loss_weights`.

    Args:
        answers: of the micro-batch; of the whole update for types that rank its pairs (`aot`, `aot_unpaired`).
        kl: for `kto`, the policy's distance from the reference, without gradient; see `kto_kl`.

    Returns:
        The scalar loss, and shares of the update's means for the metrics; both add up over micro-batches.
    """
    good, bad = answers.good, answers.bad
    likelihood_weight = {"sft": 1.0, "cpo": config.cpo_alpha, "orpo": 1.0}
    loss = answers.logp_S.new_zeros(())
    metrics: Metrics = {}
    for name, weight in config.weighted_losses:
        part = loss.new_zeros(())
        if name == "kto":
            assert kl is not None, "kto needs an estimate of the KL divergence"
            part = part + kto(answers, config, kl).sum() / max(totals.good + totals.bad, 1)
        if name in PAIR_LOSSES:
            losses_B = PAIR_LOSSES[name](good, bad, config)
            if config.use_weighting:
                losses_B = losses_B * (good.log_weight_S + bad.log_weight_S).exp()
            part = part + losses_B.sum() / max(totals.pairs, 1)
        if likelihood_weight.get(name):
            part = part - likelihood_weight[name] * good.plain_logp_S.sum() / max(totals.good_tokens, 1)
        if len(config.loss_type) > 1:
            metrics[f"loss/{name}"] = part.detach()
        loss = loss + weight * part
    return loss, metrics | _reward_metrics(good, bad, config, totals)


def kto(answers: Answers, config: DPOConfig, kl: Tensor) -> Tensor:
    """(S,) losses of single answers (KTO, arXiv 2402.01306, eq. 7), r the log-ratio of policy and reference:
    desirable_weight (1 - sigma(beta (r - kl))) for good ones, undesirable_weight (1 - sigma(beta (kl - r))) for bad.
    """
    gain = config.beta * (answers.log_ratio_S - kl)
    return torch.where(
        answers.labels_S,
        config.desirable_weight * torch.sigmoid(-gain),
        config.undesirable_weight * torch.sigmoid(gain),
    )


def kto_kl(mismatched: Answers) -> Tensor:
    """The KL divergence that KTO compares rewards with: mean log-ratio of answers to other prompts, at least 0."""
    return mismatched.log_ratio_S.mean().clamp(min=0).detach()


@torch.no_grad()
def _reward_metrics(good: Answers, bad: Answers, config: DPOConfig, totals: AnswerTotals) -> Metrics:
    """Implicit rewards and log-probabilities; the margin is the difference of the mean rewards."""
    metrics: Metrics = {}
    rewards = {"chosen": _rewards(good, config), "rejected": _rewards(bad, config)}
    for name, side, count in (("chosen", good, totals.good), ("rejected", bad, totals.bad)):
        if count:
            metrics[f"rewards/{name}"] = rewards[name].sum() / count
            metrics[f"logps/{name}"] = side.logp_S.sum() / count
    if totals.good and totals.bad:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if totals.pairs:
        metrics["rewards/accuracies"] = (rewards["chosen"] > rewards["rejected"]).float().sum() / totals.pairs
    return metrics


def _rewards(answers: Answers, config: DPOConfig) -> Tensor:
    """What the first loss beside `sft` takes an answer's reward to be."""
    main = next((name for name in config.loss_type if name != "sft"), "sft")
    return config.beta * (answers.mean_logp_S if main in ("simpo", "orpo") else answers.log_ratio_S)
