"""The losses: pure functions of logprobs that return (loss, metrics).

A loss is the micro-batch's share of the whole update's: it divides by counts over the update (`totals`), so shares of
any split into micro-batches add up to the same loss. Metrics are sums; whoever collects them divides by the same
totals. Everything is float32.
"""

from rlqwen.algorithms.losses.clipping import clipped_surrogate
from rlqwen.algorithms.losses.correction import rollout_correction
from rlqwen.algorithms.losses.grpo import grpo_loss, token_weights
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.ppo import ppo_policy_loss, ppo_value_loss
from rlqwen.algorithms.losses.reduction import Metrics, Totals, sequence_mean, sequence_sum
from rlqwen.algorithms.losses.reward import reward_loss
from rlqwen.algorithms.losses.sft import sft_loss

__all__ = [
    "Metrics",
    "Totals",
    "clipped_surrogate",
    "grpo_loss",
    "kl_divergence",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reward_loss",
    "rollout_correction",
    "sequence_mean",
    "sequence_sum",
    "sft_loss",
    "token_weights",
]
