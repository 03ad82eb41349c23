"""Collect the metrics of losses; each says how it is reduced over micro-batches and ranks.

Example:
    def my_loss(ratio, advantage):
        return -ratio * advantage, {"ratio": token_mean(ratio), "ratio_max": maximum(ratio)}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")

Reduction = Literal["token_mean", "sequence_mean", "sum", "max"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of one micro-batch."""

    value: Tensor
    """Scalar: the sum over the micro-batch, or its maximum."""
    reduction: Reduction


def token_mean(values_N: Tensor) -> Metric:
    """Report the mean of `values_N` over all tokens of a step."""
    return Metric(values_N.detach().float().sum(), "token_mean")


def sequence_mean(values_S: Tensor) -> Metric:
    """Report the mean of `values_S` over all sequences (with pairs: all pairs) of a step."""
    return Metric(values_S.detach().float().sum(), "sequence_mean")


def total(values: Tensor) -> Metric:
    """Report the sum of `values` over a step."""
    return Metric(values.detach().float().sum(), "sum")


def maximum(values: Tensor) -> Metric:
    """Report the largest of `values` in a step; -inf if there are none."""
    largest = values.detach().float().max() if values.numel() else values.new_full((), float("-inf")).float()
    return Metric(largest, "max")


Sums = dict[tuple[str, Reduction], float]


def add_on_device(sum_so_far: Tensor | float, value: Tensor) -> Tensor:
    """Return the sum in float64 on the device of `value`, without waiting for the device."""
    return value.detach().double() + sum_so_far


def read_scalars(values: Mapping[Key, Tensor | float]) -> dict[Key, float]:
    """Return the values as floats; wait for each device only once."""
    tensors = {key: value.detach().double() for key, value in values.items() if isinstance(value, Tensor)}
    read = {key: float(value) for key, value in values.items() if not isinstance(value, Tensor)}
    for device in {tensor.device for tensor in tensors.values()}:
        on_device = {key: tensor for key, tensor in tensors.items() if tensor.device == device}
        read |= zip(on_device, torch.stack([tensor.reshape(()) for tensor in on_device.values()]).tolist(), strict=True)
    return {key: read[key] for key in values}


@dataclass(slots=True)
class MetricSums:
    """Collect the metrics of a step over micro-batches; values on a GPU are waited for only when they are read."""

    _sums: dict[tuple[str, Reduction], Tensor | float] = field(default_factory=dict)

    @property
    def sums(self) -> Sums:
        """Return the collected sums and maxima as floats."""
        return read_scalars(self._sums)

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the metrics of a micro-batch."""
        self.join({(name, metric.reduction): metric.value.detach().double() for name, metric in metrics.items()})

    def join(self, sums: Mapping[tuple[str, Reduction], Tensor | float]) -> None:
        """Add the sums of another rank, or of another update."""
        for key, value in sums.items():
            if key[1] == "max":
                before = self._sums.get(key, float("-inf"))
                both = (torch.as_tensor(one, dtype=torch.float64) for one in (before, value))
                self._sums[key] = torch.maximum(*both)
            else:
                self._sums[key] = self._sums.get(key, 0.0) + value

    def reduce(self, gather: Callable[[Sums], list[Sums]], *, tokens: float, sequences: float) -> dict[str, float]:
        """Return each metric over all ranks.

        `gather` returns the sums of every rank. Means are divided by `tokens` or `sequences`, the counts over all ranks.
        """
        whole = MetricSums()
        for sums in gather(self.sums):
            whole.join(sums)
        counts = {"token_mean": max(tokens, 1.0), "sequence_mean": max(sequences, 1.0), "sum": 1.0, "max": 1.0}
        return {name: value / counts[reduction] for (name, reduction), value in whole.sums.items()}
