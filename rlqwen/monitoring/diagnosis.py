"""Define what a symptom sees of a step and what it reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlqwen.config import OnlineConfig, TrainerConfig
from rlqwen.monitoring.metric_history import MetricHistory


@dataclass(slots=True, frozen=True)
class Diagnosis:
    """Say what is wrong with a step."""

    value: float
    threshold: float
    cause: str
    advice: list[str]
    """Recipe lines to change, such as `train.beta: 0.0 -> try 0.04`."""


@dataclass(slots=True, frozen=True)
class ObservedStep:
    """Hold the metrics of a step, the history of those before it, and the run's settings."""

    metrics: Mapping[str, float]
    history: MetricHistory
    args: TrainerConfig

    @property
    def samples(self) -> bool:
        """Return whether the run trains on completions that it samples itself."""
        return isinstance(self.args, OnlineConfig)

    def get(self, key: str) -> float:
        """Return a metric, or NaN, which makes every comparison False, if the step has none under `key`."""
        return self.metrics.get(key, math.nan)

    def change(self, key: str, proposal: str) -> str:
        """Return `key: present value -> proposal`, for a key as it is written in a recipe."""
        value: Any = self.args
        for name in key.removeprefix("train.").split("."):
            value = getattr(value, name)
        return f"{key}: {f'{value:g}' if isinstance(value, float) else value} -> {proposal}"

    def lower_learning_rate(self) -> str:
        """Return the recipe line that lowers the learning rate."""
        return self.change("train.learning_rate", f"try {self.args.learning_rate / 3:.2g}")

    def raise_coefficient(self, *names: str, start: float) -> list[str]:
        """Return the recipe line that doubles a coefficient, or sets it to `start` if it is 0: of the first of `names` that
        the algorithm has. Empty if it has none."""
        for name in names:
            if hasattr(self.args, name):
                return [self.change(f"train.{name}", f"try {2 * getattr(self.args, name) or start:g}")]
        return []

    def longer_completions(self) -> str:
        """Return the recipe line that allows longer completions."""
        return self.change("train.max_completion_length", f"try {2 * self.args.max_completion_length}")  # type: ignore[attr-defined]
