"""What every loss divides by, and sums over sequences.

Shapes: N target tokens, S sequences; `sequence_N` says which sequence a token belongs to.
"""

from dataclasses import dataclass

from torch import Tensor

from rlqwen.packing.batch import PackedBatch

Metrics = dict[str, Tensor]


@dataclass(slots=True, frozen=True)
class Totals:
    """Counts over the whole update and all ranks, by which losses divide."""

    tokens: float
    sequences: float


def sequence_sum(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """(S,) sums over the tokens of each sequence."""
    return values_N.new_zeros(batch.num_sequences).index_add(0, batch.sequence_N, values_N)


def sequence_mean(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """(S,) means over the tokens of each sequence; 0 for an empty one."""
    return sequence_sum(values_N, batch) / batch.lengths_S.clamp(min=1)
