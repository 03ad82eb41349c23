"""Run the steps of a training: train, log, check, evaluate, save, until the end or a request to stop."""

from collections.abc import Callable
from typing import Any

from rlqwen.errors import MainRankFailed, RolloutError
from rlqwen.trainers.best_checkpoint import Verdict
from rlqwen.trainers.checkpointer import Checkpointer
from rlqwen.trainers.evaluator import Evaluator
from rlqwen.trainers.health_monitor import HealthMonitor
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_logger import Metrics
from rlqwen.trainers.schedule import Schedule


class TrainingLoop:
    """Call a trainer's step again and again, and do what is due in between."""

    def __init__(
        self,
        step: Callable[[], Metrics],
        run: RunContext,
        *,
        schedule: Schedule,
        evaluator: Evaluator[Any],
        checkpointer: Checkpointer,
        monitor: HealthMonitor,
        how_to_resume: str,
    ) -> None:
        """Run `step`, which trains on the next rows and returns metrics; `how_to_resume` ends a preemption's message."""
        self._step = step
        self._args, self._ranks, self._state = run.args, run.ranks, run.state
        self._preemption, self._callbacks, self._logger = run.preemption, run.callbacks, run.logger
        self._schedule = schedule
        self._evaluator = evaluator
        self._checkpointer = checkpointer
        self._monitor = monitor
        self._how_to_resume = how_to_resume

    def run(self) -> None:
        """Run steps until the last update, or until a callback asks to stop.

        Raises Preempted after saving a checkpoint if a signal came.
        """
        while self._state.global_step < self._state.max_steps and not self._callbacks.control.should_training_stop:
            self._preemption.listen()
            begun = self._checkpointer.remember_step()
            try:
                self._run_step()
            except (RolloutError, MainRankFailed) as error:
                obstacle = self._checkpointer.save_begun_step(begun, error)
                saved = f"saved after update {self._state.global_step}" if not obstacle else ""
                # A scheduler's signal may reach the workers too, and end them before the update is done.
                if self._preemption.name is not None:
                    lost = f"{saved or 'the update in progress was lost'}{self._how_to_resume}"
                    raise self._preemption.ended(lost) from error
                if isinstance(error, MainRankFailed):
                    raise
                told = f"{saved}{self._how_to_resume}" if saved else f"{self._last_saved()}, because {obstacle}"
                raise type(error)(f"{error}\n{told}") from error
            self._preemption.worth_saving = self._checkpointer.saved_step != self._state.global_step
            if any(self._ranks.gather(self._preemption.name is not None)):
                self._checkpointer.save()
                raise self._preemption.ended(f"saved after update {self._state.global_step}" + self._how_to_resume)

    def _last_saved(self) -> str:
        step = self._checkpointer.saved_step
        return "no checkpoint is made" + (f" after that of update {step}" if step >= 0 else "")

    def _run_step(self) -> None:
        """Train on the next rows; then log, check, evaluate and save what is due."""
        before = self._state.global_step
        metrics = self._step()
        if self._schedule.logs(before) or self._callbacks.control.should_log:
            self._logger.log(metrics)
        action = self._monitor.check(metrics)
        if action == "stop":
            self._monitor.stop(self._checkpointer)
        if action == "rollback":
            self._monitor.roll_back(self._checkpointer)
            return
        control = self._callbacks.control
        control.should_evaluate |= self._schedule.evaluates(before)
        control.should_save |= self._schedule.saves(before, last_save=self._checkpointer.saved_at)
        self._callbacks.agree(self._ranks)
        if control.should_evaluate and self._evaluator.rows:
            self._evaluate_and_keep_best()
        if self._callbacks.control.should_save:
            self._checkpointer.save()
        control = self._callbacks.control
        control.should_log = control.should_evaluate = control.should_save = False

    def _evaluate_and_keep_best(self) -> None:
        """Evaluate; save a checkpoint of the best result, and stop if there was no better one for too long."""
        metrics = self._evaluator.run()
        if not self._args.load_best_model_at_end and self._args.early_stopping_patience is None:
            return
        verdict = self._evaluator.judge(metrics)
        if verdict is Verdict.BEST and self._args.load_best_model_at_end:
            self._checkpointer.save(best=True)
        if verdict is Verdict.STOP:
            self._logger.note(f"stopped early at update {self._state.global_step}: {self._evaluator.best}")
            self._callbacks.control.should_training_stop = True
