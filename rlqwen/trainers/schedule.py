"""Decide when a run logs, evaluates and saves."""

import time
from typing import Any

from rlqwen.trainers.data_stream import RowStream
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.trainers.run_context import RunContext


class Schedule:
    """Compare the updates made by a step, from `before` to the state's `global_step`, with the intervals of the config."""

    def __init__(self, run: RunContext, stream: RowStream[Any] | ItemStream[Any], *, rows_per_step: int) -> None:
        self._args, self._ranks, self._state = run.args, run.ranks, run.state
        self._stream = stream
        self._rows_per_step = rows_per_step

    def logs(self, before: int) -> bool:
        """Return whether metrics are due; those of the last update always are."""
        return self.passes(self._args.logging_steps, before) or self._state.global_step >= self._state.max_steps

    def evaluates(self, before: int) -> bool:
        """Return whether an evaluation is due."""
        return self._is_due(self._args.eval_strategy, self._args.eval_steps or self._args.logging_steps, before)

    def saves(self, before: int, *, last_save: float) -> bool:
        """Return whether a checkpoint is due; `last_save`: time.monotonic() of the last one."""
        if self._is_due(self._args.save_strategy, self._args.save_steps, before):
            return True
        minutes = self._args.save_minutes
        return minutes is not None and self._ranks.from_main(time.monotonic() - last_save >= 60 * minutes)

    def _is_due(self, strategy: str, every: int, before: int) -> bool:
        if strategy == "steps":
            return self.passes(every, before)
        return strategy == "epoch" and self._stream.ended_epoch(self._rows_per_step)

    def passes(self, every: int, before: int) -> bool:
        """Return whether the step passed a multiple of `every` updates."""
        return self._state.global_step // every > before // every
