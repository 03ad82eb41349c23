"""Call losses and estimators as trainers do, and return plain values, for tests that compute them by hand."""

from rlqwen.algorithms.losses import GRPOLoss, LossCall, PPOPolicyLoss
from rlqwen.algorithms.losses import ppo_value_loss as value_loss
from rlqwen.algorithms.losses.preference import PreferenceLoss
from rlqwen.plugins.kinds import ADVANTAGES
from rlqwen.plugins.named_call import NamedCall


def grpo_loss(logp, entropy, batch, config, totals):
    loss, metrics = GRPOLoss(config)(logp, entropy, batch, totals)
    return loss, {name: metric.value for name, metric in metrics.items()}


def ppo_policy_loss(logp, entropy, batch, config, totals, *, kl_coef):
    loss, metrics = PPOPolicyLoss(config)(logp, entropy, batch, totals, kl_coef=kl_coef)
    return loss, {name: metric.value for name, metric in metrics.items()}


def ppo_value_loss(values, batch, config, totals):
    loss, metrics = value_loss(values, batch, config, totals)
    return loss, {name: metric.value for name, metric in metrics.items()}


def sft_loss(logp, totals):
    losses, _ = LossCall("nll", inputs=("logp",), settings={})({"logp": logp})
    return losses.sum() / max(totals.tokens, 1.0), {}


def reward_loss(chosen, rejected, margin, totals, *, center_coefficient=None):
    call = LossCall(
        "bradley_terry",
        inputs=("chosen", "rejected", "margin"),
        settings={"center_rewards_coefficient": center_coefficient},
    )
    losses, metrics = call({"chosen": chosen, "rejected": rejected, "margin": margin})
    return losses.sum() / max(totals.sequences, 1.0), {name: metric.value for name, metric in metrics.items()}


def preference_loss(answers, config, totals, *, kl=None):
    loss, shares, _ = PreferenceLoss(config)(answers, totals, kl=kl)
    return loss, shares


def group_advantages(rewards, *, estimator="group", scale="group"):
    call = NamedCall.find(ADVANTAGES, estimator, inputs=("rewards", "lengths"), settings={"scale_rewards": scale})
    return call({"rewards": rewards})
