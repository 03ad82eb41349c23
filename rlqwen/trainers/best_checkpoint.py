"""Find the best evaluation of a run, and decide when to stop early."""

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from rlqwen.config import TrainerConfig
from rlqwen.reporting.metric_names import find_metric

# Last parts of keys of evaluation metrics of which less is better.
_BETTER_LOW = {
    "truncated", "missing", "unparsable", "timeout", "error", "invalid", "restarts", "time", "seconds", "wait_seconds",
    "kl"
}  # fmt: skip


class Verdict(Enum):
    """The result of comparing an evaluation with the best one so far."""

    BEST = "best so far"
    WORSE = "no improvement"
    STOP = "no improvement for too long"


class BestMetric:
    """Follow `metric_for_best_model` over the evaluations of a run."""

    def __init__(self, args: TrainerConfig, default_name: str) -> None:
        self.args = args
        self.name = args.metric_for_best_model or default_name
        self.value: float | None = None
        self.num_worse = 0
        """Evaluations since the best."""

    def __str__(self) -> str:
        value = "nothing" if self.value is None else f"{self.value:.4g}"
        return f"{self.name} has not improved on {value} for {self.num_worse} evaluations"

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the best value so far, and the evaluations since."""
        return {"value": self.value, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`."""
        self.value, self.num_worse = state["value"], state["num_worse"]

    def find_key(self, keys: Iterable[str]) -> str:
        """Return the one of `keys` that the config names; ConfigError if there is none."""
        return find_metric(self.name, keys)

    def judge(self, metrics: Mapping[str, float]) -> Verdict:
        """Compare an evaluation with the best one so far; NaN is never better. ConfigError if it lacks the metric."""
        key = self.find_key(metrics)
        value = metrics[key]
        if not math.isnan(value) and (
            self.value is None or self._gain(key, value) > self.args.early_stopping_threshold
        ):
            self.value, self.num_worse = value, 0
            return Verdict.BEST
        self.num_worse += 1
        patience = self.args.early_stopping_patience
        return Verdict.STOP if patience is not None and self.num_worse >= patience else Verdict.WORSE

    def _gain(self, key: str, value: float) -> float:
        assert self.value is not None
        greater = self.args.greater_is_better
        if greater is None:
            greater = not key.endswith(("loss", "perplexity")) and key.rpartition("/")[2] not in _BETTER_LOW
        return value - self.value if greater else self.value - value
