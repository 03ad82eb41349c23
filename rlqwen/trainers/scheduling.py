"""When a run logs, evaluates and saves."""

import time

from rlqwen.preflight import BatchPlan
from rlqwen.trainers.saving import Saving


class Scheduling(Saving):
    """The part of a trainer that knows what is due."""

    plan: BatchPlan

    def _due(self, every: int, before: int) -> bool:
        """Whether the step passed a multiple of `every`, or was the last."""
        now = self.state.global_step
        return now // every > before // every or now >= self.state.max_steps

    def _minutes_have_passed(self) -> bool:
        """Whether a checkpoint is due by the main rank's clock."""
        minutes = self.args.save_minutes
        return minutes is not None and self.ranks.from_main(time.monotonic() - self._last_save >= 60 * minutes)

    def _scheduled(self, strategy: str, every: int, before: int) -> bool:
        if strategy == "steps":
            return self.state.global_step // every > before // every
        if strategy == "epoch":
            return self.stream.ended_epoch(self.plan.rows_per_step)
        return False

    def _agree(self) -> None:
        """What one rank has been asked to do, by a callback or a signal, all ranks do."""
        names = ("should_evaluate", "should_save", "should_training_stop")
        asked = self.ranks.gather([getattr(self.control, name) for name in names])
        for name, values in zip(names, zip(*asked, strict=True), strict=True):
            setattr(self.control, name, any(values))
