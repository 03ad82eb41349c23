"""Reduce values of tokens: sums and means over sequences, and the counts by which losses divide.

Shapes: N target tokens, S sequences.
"""

from dataclasses import dataclass

from torch import Tensor

from rlqwen.packing.batch import PackedBatch


@dataclass(slots=True, frozen=True)
class Totals:
    """Hold counts over the whole update on all ranks, by which losses divide."""

    tokens: float
    sequences: float


def sequence_sum(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """Return the (S,) sums over the tokens of each sequence."""
    return values_N.new_zeros(batch.num_sequences).index_add(0, batch.sequence_N, values_N)


def sequence_mean(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """Return the (S,) means over the tokens of each sequence; 0 if it has none."""
    return sequence_sum(values_N, batch) / batch.lengths_S.clamp(min=1)
