"""Metrics of a loss: each says how it is reduced over micro-batches and ranks.

Example:
    def my_loss(ratio, advantage):
        return -ratio * advantage, {"ratio": token_mean(ratio), "ratio_max": maximum(ratio)}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "sum", "max"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one micro-batch."""

    value: Tensor
    """Scalar: the sum over the micro-batch, or the maximum."""
    reduction: Reduction


def token_mean(values_N: Tensor) -> Metric:
    """Report the mean of `values_N` over all tokens of a step."""
    return Metric(values_N.detach().float().sum(), "token_mean")


def sequence_mean(values_S: Tensor) -> Metric:
    """Report the mean of `values_S` over all sequences (of pairs: over all pairs) of a step."""
    return Metric(values_S.detach().float().sum(), "sequence_mean")


def total(values: Tensor) -> Metric:
    """Report the sum of `values` over a step."""
    return Metric(values.detach().float().sum(), "sum")


def maximum(values: Tensor) -> Metric:
    """Report the largest of `values` in a step; nothing if there are none."""
    largest = values.detach().float().max() if values.numel() else values.new_full((), float("-inf")).float()
    return Metric(largest, "max")


Sums = dict[tuple[str, Reduction], float]


@dataclass(slots=True)
class MetricSums:
    """Metrics of a step, collected over micro-batches."""

    sums: Sums = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the metrics of a micro-batch."""
        self.join({(name, metric.reduction): float(metric.value) for name, metric in metrics.items()})

    def join(self, sums: Sums) -> None:
        """Add what another has collected."""
        for key, value in sums.items():
            if key[1] == "max":
                self.sums[key] = max(self.sums.get(key, float("-inf")), value)
            else:
                self.sums[key] = self.sums.get(key, 0.0) + value

    def reduce(self, gather: Callable[[Sums], list[Sums]], *, tokens: float, sequences: float) -> dict[str, float]:
        """Return each metric over all ranks.

        `gather` returns what every rank collected; means divide by `tokens` and `sequences`, which count all ranks'.
        """
        whole = MetricSums()
        for sums in gather(self.sums):
            whole.join(sums)
        counts = {"token_mean": max(tokens, 1.0), "sequence_mean": max(sequences, 1.0), "sum": 1.0, "max": 1.0}
        return {name: value / counts[reduction] for (name, reduction), value in whole.sums.items()}
