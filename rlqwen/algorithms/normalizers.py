"""Normalize token losses, so that their sum over an update is the mean that the algorithm wants.

A normalizer returns the (N,) factor by which each token's loss is multiplied; the products are then summed over all
micro-batches and ranks of the update. It is called with those of these inputs that its signature names:

- `lengths`: (S,) float, target tokens of each sequence of the micro-batch.
- `sequence`: (N,) long, index (0 to S-1) of the sequence to which each token belongs.
- `num_tokens`, `num_sequences`: counts over the whole update, at least 1.
- settings of the trainer's config, such as `max_completion_length`.
"""

import torch
from torch import Tensor


def token_mean(sequence: Tensor, num_tokens: float) -> Tensor:
    """Weight all tokens of the update equally (DAPO, arXiv 2503.14476)."""
    return torch.full_like(sequence, 1.0 / num_tokens, dtype=torch.float32)


def sequence_mean(lengths: Tensor, sequence: Tensor, num_sequences: float) -> Tensor:
    """Weight all completions equally, and the tokens of a completion by 1 / its length (GRPO, arXiv 2402.03300)."""
    return (1.0 / (lengths.clamp(min=1) * num_sequences))[sequence]


def constant_length(sequence: Tensor, num_sequences: float, max_completion_length: int) -> Tensor:
    """Divide by the maximum length of completions instead of their own lengths (Dr. GRPO, arXiv 2503.20783)."""
    return torch.full_like(sequence, 1.0 / (num_sequences * max_completion_length), dtype=torch.float32)
