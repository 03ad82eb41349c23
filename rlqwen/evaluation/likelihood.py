"""Measure how likely a model finds given texts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rlqwen.data import TokenizedRow
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree

# exp of more overflows a float.
_LARGEST_EXPONENT = 700.0


@dataclass(slots=True, frozen=True)
class Likelihood:
    """Negative log-likelihood of a set of texts."""

    nats: float
    """Summed over the target tokens."""
    tokens: int
    """Target tokens."""

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean over all tokens, which is not a mean over texts."""
        return math.exp(min(self.loss, _LARGEST_EXPONENT))


def measure_likelihood(policy: Policy, batches: Iterable[PackedBatch]) -> Likelihood:
    """Return the likelihood of the target tokens of all batches."""
    nats, tokens = 0.0, 0
    with policy.inference():
        for batch in batches:
            logp_N, _ = policy.logprobs(batch.to(policy.device))
            nats -= logp_N.sum().item()
            tokens += batch.num_targets
    return Likelihood(nats, tokens)


def sequence_tree(row: TokenizedRow) -> Tree:
    """Return a whole sequence as the only branch of an empty prefix."""
    return Tree([], [Branch(row.token_ids, row.loss_mask)])
