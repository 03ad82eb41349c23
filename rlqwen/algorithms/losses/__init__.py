"""Define losses: pure functions of named inputs.

A loss that a config can name returns one value per token, sequence or pair, and optionally metrics (see
rlqwen.algorithms.loss_metrics). The caller sums these values to the micro-batch's share of the update's loss. Shares are
divided by counts over the whole update (`Totals`), so they add up to the same loss for every split into micro-batches.
All values are float32.
"""

from rlqwen.algorithms.losses.calls import LossCall, Normalizer, settings_of
from rlqwen.algorithms.losses.clipping import clipped_surrogate
from rlqwen.algorithms.losses.correction import rollout_correction
from rlqwen.algorithms.losses.grpo import GRPOLoss
from rlqwen.algorithms.losses.kl import kl_divergence
from rlqwen.algorithms.losses.ppo import PPOPolicyLoss, ppo_value_loss
from rlqwen.algorithms.losses.reduction import Totals, sequence_mean, sequence_sum

__all__ = [
    "GRPOLoss",
    "LossCall",
    "Normalizer",
    "PPOPolicyLoss",
    "Totals",
    "clipped_surrogate",
    "kl_divergence",
    "ppo_value_loss",
    "rollout_correction",
    "sequence_mean",
    "sequence_sum",
    "settings_of",
]
