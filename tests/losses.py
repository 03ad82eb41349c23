"""Call losses and estimators as trainers do, and return plain values, for tests that compute them by hand."""

from typing import Any

import torch
from torch import Tensor

from rlqwen import GRPOConfig, PPOConfig
from rlqwen.algorithms.losses import GRPOLoss, LossCall, PPOPolicyLoss, Totals
from rlqwen.algorithms.losses import ppo_value_loss as value_loss
from rlqwen.algorithms.losses.preference import AnswerTotals, PreferenceLoss
from rlqwen.algorithms.losses.preference.answers import Answers
from rlqwen.config import DPOConfig
from rlqwen.packing.batch import PackedBatch
from rlqwen.plugins.kinds import ADVANTAGES
from rlqwen.plugins.named_call import NamedCall


def grpo_loss(
    logp: Tensor, entropy: Tensor | None, batch: PackedBatch, config: GRPOConfig, totals: Totals
) -> tuple[torch.Tensor, dict[str, Tensor]]:
    loss, metrics = GRPOLoss(config)(logp, entropy, batch, totals)
    return loss, {name: metric.value for name, metric in metrics.items()}


def ppo_policy_loss(
    logp: Tensor, entropy: Tensor | None, batch: PackedBatch, config: PPOConfig, totals: Totals, *, kl_coef: float
) -> tuple[torch.Tensor, dict[str, Tensor]]:
    loss, metrics = PPOPolicyLoss(config)(logp, entropy, batch, totals, kl_coef=kl_coef)
    return loss, {name: metric.value for name, metric in metrics.items()}


def ppo_value_loss(
    values: Tensor, batch: PackedBatch, config: PPOConfig, totals: Totals
) -> tuple[torch.Tensor, dict[str, Tensor]]:
    loss, metrics = value_loss(values, batch, config, totals)
    return loss, {name: metric.value for name, metric in metrics.items()}


def sft_loss(logp: Tensor, totals: Totals) -> tuple[Any, dict[Any, Any]]:
    losses, _ = LossCall("nll", inputs=("logp",), settings={})({"logp": logp})
    return losses.sum() / max(totals.tokens, 1.0), {}


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor, totals: Totals, *, center_coefficient: float | None = None
) -> tuple[Any, dict[str, Tensor]]:
    call = LossCall(
        "bradley_terry",
        inputs=("chosen", "rejected", "margin"),
        settings={"center_rewards_coefficient": center_coefficient},
    )
    losses, metrics = call({"chosen": chosen, "rejected": rejected, "margin": margin})
    return losses.sum() / max(totals.sequences, 1.0), {name: metric.value for name, metric in metrics.items()}


def preference_loss(
    answers: Answers, config: DPOConfig, totals: AnswerTotals, *, kl: Tensor | None = None
) -> tuple[torch.Tensor, dict[str, Tensor]]:
    loss, shares, _ = PreferenceLoss(config)(answers, totals, kl=kl)
    return loss, shares


def group_advantages(rewards: Tensor, *, estimator: str = "group", scale: str = "group") -> Any:
    call = NamedCall.find(ADVANTAGES, estimator, inputs=("rewards", "lengths"), settings={"scale_rewards": scale})
    return call({"rewards": rewards})
