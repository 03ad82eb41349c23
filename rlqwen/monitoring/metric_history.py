"""Keep the first and the last values of metrics, for the monitor to compare with."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any


class MetricHistory:
    """Compute medians of metrics over the first `start_steps` values of the run and over the last `window` values."""

    def __init__(self, start_steps: int, window: int) -> None:
        self._start_steps = start_steps
        self._window = window
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the values of a step, except those that are not finite."""
        for key, value in metrics.items():
            if not math.isfinite(value):
                continue
            first = self._first.setdefault(key, [])
            if len(first) < self._start_steps:
                first.append(value)
            self._last.setdefault(key, deque(maxlen=self._window)).append(value)

    def start(self, key: str) -> float | None:
        """Return the median of the first values; None until there are `start_steps` of them."""
        first = self._first.get(key, [])
        return statistics.median(first) if len(first) == self._start_steps else None

    def recent(self, key: str, min_values: int) -> float | None:
        """Return the median of the last nonzero values; None if there are fewer than `min_values`."""
        values = [value for value in self._last.get(key, ()) if value]
        return statistics.median(values) if len(values) >= min_values else None

    def state_dict(self) -> dict[str, Any]:
        """Return the values as JSON values."""
        return {"first": self._first, "last": {key: list(values) for key, values in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by `state_dict`."""
        self._first = {key: list(values) for key, values in state["first"].items()}
        self._last = {key: deque(values, maxlen=self._window) for key, values in state["last"].items()}
