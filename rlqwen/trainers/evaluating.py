"""How a run looks at itself from outside: figures on rows that it does not train on."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rlqwen.errors import DataError
from rlqwen.trainers.saving import Saving
from rlqwen.trainers.telling import Metrics


class Evaluating(Saving, ABC):
    """The part of a trainer that evaluates."""

    @abstractmethod
    def compute_evaluation(self, rows: Sequence[Any]) -> Metrics:
        """Figures of the present policy on `rows`; keys without the prefix `eval/`."""

    def evaluate(self, eval_dataset: Any = None) -> Metrics:
        """Figures on `eval_dataset`, or on the eval set of the constructor, under keys that begin with `eval/`."""
        rows = self.eval_rows if eval_dataset is None else self.prepare_rows(eval_dataset, evaluation=True)
        if not rows:
            raise DataError("there is nothing to evaluate on: give eval_dataset")
        started = time.monotonic()
        with self.policy.inference():
            figures = self.compute_evaluation(rows)
        metrics = {f"eval/{key}": value for key, value in figures.items()}
        metrics["eval/time"] = time.monotonic() - started
        metrics = self.ranks.from_main(metrics)  # what is decided by them is then decided alike everywhere
        self._log(metrics)
        # transformers' own callbacks look for `eval_loss`, ours for `eval/loss`.
        self._notify("on_evaluate", metrics=metrics | {key.replace("/", "_"): v for key, v in metrics.items()})
        return metrics

    @abstractmethod
    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[Any]:
        """Tokenise a dataset."""

    def _final_evaluation(self, restored: bool) -> Metrics:
        """The last evaluation, unless the last step made it already of the same weights."""
        last = next((entry for entry in reversed(self.state.log_history) if "eval/time" in entry), None)
        if last is not None and last["step"] == self.state.global_step and not restored:
            return {key: value for key, value in last.items() if key.startswith("eval/")}
        return self.evaluate()
