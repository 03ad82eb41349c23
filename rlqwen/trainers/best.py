"""Which evaluation was the best, and when to stop looking for a better one."""

from collections.abc import Mapping
from enum import Enum

from rlqwen.config import TrainerConfig
from rlqwen.errors import ConfigError


class Verdict(Enum):
    """On one evaluation."""

    BEST = "best so far"
    WORSE = "no improvement"
    STOP = "no improvement for too long"


class BestMetric:
    """Follows `metric_for_best_model` over the evaluations of a run."""

    def __init__(self, args: TrainerConfig, default_name: str) -> None:
        self.args = args
        self.name = args.metric_for_best_model or default_name
        self.value: float | None = None
        self.num_worse = 0
        """Evaluations since the best."""

    def __str__(self) -> str:
        value = "nothing" if self.value is None else f"{self.value:.4g}"
        return f"{self.name} has not improved on {value} for {self.num_worse} evaluations"

    def judge(self, metrics: Mapping[str, float]) -> Verdict:
        """Take in an evaluation; raises ConfigError if it lacks the metric."""
        key = self.name if self.name in metrics else f"eval/{self.name.removeprefix('eval_')}"
        if key not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"metric_for_best_model={self.name!r} is not among the evaluation's figures: {known}")
        if self.value is None or self._gain(key, metrics[key]) > self.args.early_stopping_threshold:
            self.value, self.num_worse = metrics[key], 0
            return Verdict.BEST
        self.num_worse += 1
        patience = self.args.early_stopping_patience
        return Verdict.STOP if patience is not None and self.num_worse >= patience else Verdict.WORSE

    def _gain(self, key: str, value: float) -> float:
        assert self.value is not None
        greater = self.args.greater_is_better
        if greater is None:
            greater = not key.endswith(("loss", "perplexity"))
        return value - self.value if greater else self.value - value
