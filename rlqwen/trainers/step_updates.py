"""Apply the updates of a step, and keep batches whose gradient is not finite."""

from collections.abc import Sequence

from rlqwen.distributed import OptimizerStep, UpdateResult
from rlqwen.errors import NonFiniteError
from rlqwen.packing.batch import PackedBatch
from rlqwen.trainers.micro_batching import save_batches
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_logger import Metrics


class StepUpdates:
    """Count the updates of a run, and report on those of the current step."""

    def __init__(self, run: RunContext) -> None:
        self._folder = run.output_dir / "nonfinite"
        self._ranks, self._state = run.ranks, run.state
        self._results: list[UpdateResult] = []

    def start_step(self) -> None:
        """Forget the updates of the last step."""
        self._results = []

    def apply(self, optimizer: OptimizerStep, micro_batches: Sequence[PackedBatch]) -> UpdateResult:
        """Apply the gathered gradient; write the batch to `nonfinite/` of the run folder if it is not finite."""
        self._state.global_step += 1
        try:
            result = optimizer.step()
        except NonFiniteError:
            self._keep(micro_batches)
            raise
        self._results.append(result)
        if result.skipped:
            self._keep(micro_batches)
        return result

    @property
    def last(self) -> UpdateResult:
        """Return the last update of the step."""
        return self._results[-1]

    def metrics(self) -> Metrics:
        """Return the gradient norm and learning rate of the last update, and the number of skipped updates."""
        return {
            "grad_norm": self.last.grad_norm,
            "learning_rate": self.last.lr,
            "updates/skipped": float(sum(result.skipped for result in self._results)),
        }

    def _keep(self, micro_batches: Sequence[PackedBatch]) -> None:
        save_batches(self._folder, micro_batches, step=self._state.global_step, rank=self._ranks.rank)
