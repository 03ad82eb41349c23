"""Normalize the losses of tokens: what the sum over an update's tokens is divided by.

A normalizer returns the (N,) factor that each token's loss is multiplied by, so that the sum over the micro-batches and
ranks of an update is the mean that it stands for. It is called with what its signature names:

- `lengths`: (S,) float, target tokens of each sequence of the micro-batch.
- `sequence`: (N,) long, the sequence, 0 to S-1, that each token belongs to.
- `num_tokens`, `num_sequences`: counts over the whole update, at least 1.
- settings of the trainer's config, such as `max_completion_length`.
"""

import torch
from torch import Tensor


def token_mean(sequence: Tensor, num_tokens: float) -> Tensor:
    """Weigh all tokens of the update alike (DAPO, arXiv 2503.14476)."""
    return torch.full_like(sequence, 1.0 / num_tokens, dtype=torch.float32)


def sequence_mean(lengths: Tensor, sequence: Tensor, num_sequences: float) -> Tensor:
    """Weigh all completions alike, and the tokens of a completion by its length (GRPO, arXiv 2402.03300)."""
    return (1.0 / (lengths.clamp(min=1) * num_sequences))[sequence]


def constant_length(sequence: Tensor, num_sequences: float, max_completion_length: int) -> Tensor:
    """Divide by the longest length that a completion may have, whatever its own (Dr. GRPO, arXiv 2503.20783)."""
    return torch.full_like(sequence, 1.0 / (num_sequences * max_completion_length), dtype=torch.float32)
