"""Define the losses of distillation: one value per token of the student's own samples.

A loss is called with those of these inputs that its signature names: `kl` (N,), KL(student || teacher) over the
vocabulary at each token, with gradient; `lengths` (S,) and `sequence` (N,); settings of the trainer's config; and the
recipe's `loss_args`.
"""

from torch import Tensor


def reverse_kl(kl: Tensor) -> Tensor:
    """Return the reverse KL divergence at each token (MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649)."""
    return kl
