"""The losses: pure functions of logprobs that return (loss, metrics).

A loss is the micro-batch's share of the whole update's: it divides by counts over the update (`totals`), so shares of
any split into micro-batches add up to the same loss. Metrics are sums; whoever collects them divides by the same
totals. Everything is float32.
"""

from rlqwen.losses.correction import rollout_correction
from rlqwen.losses.grpo import grpo_loss, token_weights
from rlqwen.losses.kl import kl_divergence
from rlqwen.losses.reduction import Metrics, Totals, required, sequence_mean, sequence_sum
from rlqwen.losses.sft import sft_loss

__all__ = [
    "Metrics",
    "Totals",
    "grpo_loss",
    "kl_divergence",
    "required",
    "rollout_correction",
    "sequence_mean",
    "sequence_sum",
    "sft_loss",
    "token_weights",
]
