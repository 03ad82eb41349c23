"""Define the losses of supervised fine-tuning: one value per target token.

A loss is called with those of these inputs that its signature names: `logp` (N,), logprobs under the policy with
gradient; `lengths` (S,) and `sequence` (N,); settings of the trainer's config; and the recipe's `loss_args`.
"""

from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token."""
    return -logp
