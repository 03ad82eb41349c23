"""Evaluate the policy on rows that it does not train on, and follow the best result."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from rlqwen.errors import DataError
from rlqwen.models.packed_model import PackedModel
from rlqwen.trainers.best_checkpoint import BestMetric, Verdict
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_logger import Metrics

Row = TypeVar("Row")


class Evaluator(Generic[Row]):
    """Run a trainer's evaluation, log it under `eval/`, and remember the first and the best."""

    def __init__(
        self,
        compute: Callable[[Sequence[Row]], Metrics],
        rows: Sequence[Row] | None,
        run: RunContext,
        *,
        model: PackedModel,
        best: BestMetric,
    ) -> None:
        """Evaluate by `compute`, which returns metrics of rows without the prefix `eval/`; `rows` is the evaluation set."""
        self.rows = rows
        self.best = best
        self.initial: Metrics | None = None
        """The evaluation before the first update, if `eval_on_start` asked for one."""
        self._compute = compute
        self._model = model
        self._ranks, self._state = run.ranks, run.state
        self._callbacks, self._logger = run.callbacks, run.logger

    def run(self, rows: Sequence[Row] | None = None) -> Metrics:
        """Evaluate on `rows` (None: the evaluation set), log the metrics under `eval/`, and return them.

        Raises DataError if there are no rows.
        """
        rows = self.rows if rows is None else rows
        if not rows:
            raise DataError("there is nothing to evaluate on: give eval_dataset")
        started = time.monotonic()
        with self._model.inference():
            computed = self._compute(rows)
        metrics = {f"eval/{key}": value for key, value in computed.items()}
        metrics["eval/time"] = time.monotonic() - started
        metrics = self._ranks.from_main(metrics)  # all ranks then decide alike
        self._logger.log(metrics)
        # transformers' own callbacks look for `eval_loss`, ours for `eval/loss`.
        spelled_both_ways = metrics | {key.replace("/", "_"): value for key, value in metrics.items()}
        self._callbacks.notify("on_evaluate", metrics=spelled_both_ways)
        return metrics

    def run_initial(self) -> None:
        """Evaluate before the first update, and check that the metric to compare by is among the metrics."""
        self.initial = self.run()
        self.best.find_key(self.initial)

    def run_final(self, *, model_replaced: bool) -> Metrics | None:
        """Return the metrics of the final model; None without an evaluation set.

        The last evaluation is reused if it was of the same weights. `model_replaced`: the best checkpoint was loaded.
        """
        if not self.rows:
            return None
        last = next((entry for entry in reversed(self._state.log_history) if "eval/time" in entry), None)
        if last is not None and last["step"] == self._state.global_step and not model_replaced:
            return {key: value for key, value in last.items() if key.startswith("eval/")}
        return self.run()

    def judge(self, metrics: Metrics) -> Verdict:
        """Compare an evaluation with the best so far, and record it in the trainer's state if it is better."""
        verdict = self.best.judge(metrics)
        if verdict is Verdict.BEST:
            self._state.best_metric, self._state.best_global_step = self.best.value, self._state.global_step
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Return the first evaluation and the best one."""
        return {"initial": self.initial, "best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`."""
        self.initial = state["initial"]
        self.best.load_state_dict(state["best"])
