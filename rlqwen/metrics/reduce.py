"""Metrics of one step, gathered over micro-batches: sums and counts, never means of means."""

from collections.abc import Mapping
from typing import Any


class Means:
    """Weighted means and maxima of one step.

    Values may be floats or one-element tensors; tensors are added where they live and read once, in `compute`.

        means = Means()
        means.add("entropy", entropy_N.sum(), count=N)      # each micro-batch
        logger.log(step, means.compute())                   # sum of sums over sum of counts
    """

    def __init__(self) -> None:
        self._totals: dict[str, Any] = {}
        self._counts: dict[str, Any] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, total: Any, count: Any = 1) -> None:
        """Add a sum over `count` items (tokens, sequences, calls)."""
        self._totals[name] = self._totals.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_all(self, totals: Mapping[str, Any], count: Any = 1) -> None:
        """Add several sums over the same `count` items."""
        for name, total in totals.items():
            self.add(name, total, count)

    def add_max(self, name: str, value: float) -> None:
        """Keep the largest value of the step."""
        self._maxima[name] = max(float(value), self._maxima.get(name, float("-inf")))

    def compute(self) -> dict[str, float]:
        """The step's metrics; what had no items is left out. Begins the next step empty."""
        counts = {name: float(count) for name, count in self._counts.items()}
        values = {name: float(total) / counts[name] for name, total in self._totals.items() if counts[name]}
        values |= self._maxima
        self._totals, self._counts, self._maxima = {}, {}, {}
        return values
