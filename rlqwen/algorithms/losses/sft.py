"""Supervised fine-tuning."""

from torch import Tensor

from rlqwen.algorithms.losses.reduction import Metrics, Totals


def sft_loss(logp_N: Tensor, totals: Totals) -> tuple[Tensor, Metrics]:
    """Mean negative log-likelihood a token."""
    loss = -logp_N.sum() / max(totals.tokens, 1.0)
    return loss, {}
