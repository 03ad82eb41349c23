"""Apply the updates of a step, and keep batches whose gradient is not finite."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
        self._seconds = 0.0

    def start_step(self) -> None:
        """Forget the updates of the last step."""
        self._results = []
        self._seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside as one of forward and backward passes; that of `apply` is counted already."""
        started = time.monotonic()
        yield
        self._seconds += time.monotonic() - started

    def apply(
        self, optimizer: OptimizerStep, micro_batches: Sequence[PackedBatch], *, rescale: float = 1.0
    ) -> UpdateResult:
        """Apply the gathered gradient times `rescale`; write the batch to `nonfinite/` of the run folder if it is not finite."""
        self._state.global_step += 1
        try:
            with self.timed():
                result = optimizer.step(rescale)
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

    def metrics(self, found: Metrics, *, seconds: float) -> Metrics:
        """Return metrics of the updates of a step: the last one's gradient norm and learning rate, how many were skipped,
        and where the time went.

        Args:
            found: metrics of the step itself, with the seconds that it waited for samples, rewards and the sending of
                weights, if it samples.
            seconds: duration of the step.
        """
        waited = {name: found.get(f"time/{name}", 0.0) for name in ("rollout", "reward", "sync")}
        metrics = {
            "grad_norm": self.last.grad_norm,
            "learning_rate": self.last.lr,
            "updates/skipped": float(sum(result.skipped for result in self._results)),
            "time/step": seconds,
            "time/train": seconds - sum(waited.values()),
        }
        if "time/rollout" in found:
            metrics["time/update"] = self._seconds
            metrics["time/overhead_share"] = 1 - (waited["rollout"] + self._seconds) / seconds
        return metrics

    def _keep(self, micro_batches: Sequence[PackedBatch]) -> None:
        save_batches(self._folder, micro_batches, step=self._state.global_step, rank=self._ranks.rank)
