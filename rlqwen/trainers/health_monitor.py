"""Act on the symptoms of a bad run: warn, stop, or roll back to the last checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rlqwen.config.watch import Action
from rlqwen.errors import WatchStop
from rlqwen.monitoring import Alert, Monitor, Webhook, worst_action
from rlqwen.trainers.checkpointer import Checkpointer
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_logger import Metrics

_KEPT_IN_ROLLBACK = ("stream", "history")
"""The rows that led to the symptom are not trained on again, and the time that they took has passed."""


class HealthMonitor:
    """Look at the metrics of every step on the main rank; all ranks then stop or roll back together."""

    def __init__(self, run: RunContext) -> None:
        self._args = run.args
        self._config = run.args.watch
        self._run_name = run.args.run_name or run.output_dir.name
        self._ranks, self._state, self._logger = run.ranks, run.state, run.logger
        self._monitor = Monitor(run.args)
        self._alerts: list[Alert] = []
        """Alerts of the last step."""
        self._num_rollbacks = 0
        self._webhook: Webhook | None = None

    def start(self) -> None:
        """Forget the metrics and alerts of an earlier training by the same trainer."""
        self._monitor = Monitor(self._args)

    def check(self, metrics: Metrics) -> Action | None:
        """Look at the metrics of a step, report every new alert, and return the most severe action asked for."""
        step = self._state.global_step
        alerts = self._monitor.observe(step, metrics) if self._ranks.is_main else []
        for symptom in self._monitor.cleared:
            self._logger.note(f"watch: {symptom} has cleared at step {step}")
            self._logger.event({"watch/symptom": symptom, "watch/action": "cleared"})
        for alert in alerts:
            self._logger.note(alert.text)
            self._logger.event({f"watch/{key}": value for key, value in alert.fields().items()})
            self._call_webhook("trip", alert.text, **alert.fields())
        action, self._alerts = self._ranks.from_main((worst_action(alerts), alerts))
        return action

    def roll_back(self, checkpointer: Checkpointer) -> None:
        """Restore the last checkpoint, and continue with the rows after those that led to the symptom.

        Raises WatchStop if there is no checkpoint, or if it was done `max_rollbacks` times already.
        """
        if self._num_rollbacks >= self._config.max_rollbacks:
            why = f"it was rolled back {self._num_rollbacks} times already (watch.max_rollbacks)"
            self.stop(checkpointer, why)
        checkpoint = checkpointer.newest()
        if checkpoint is None:
            self.stop(checkpointer, "there is no checkpoint to roll back to (train.save_steps)")
        self._num_rollbacks += 1
        step, alerts = self._state.global_step, self._monitor.alerts
        checkpointer.restore(checkpoint, keep=_KEPT_IN_ROLLBACK)
        self._monitor.alerts = alerts
        self._monitor.reset_symptoms()
        self._logger.note(
            f"watch: rolled back from step {step} to {checkpoint}; the rows in between are not trained on again"
        )
        self._logger.event(
            {"watch/action": "rolled back", "watch/from_step": step, "watch/to_step": self._state.global_step}
        )

    def stop(self, checkpointer: Checkpointer, why: str = "a symptom asked for it") -> NoReturn:
        """Save a checkpoint, and raise WatchStop with the causes."""
        checkpointer.save()
        causes = [alert.text for alert in self._alerts if alert.action != "warn"]
        raise WatchStop(
            "\n".join([f"the monitor (train.watch) stopped the run: {why}; the state was saved first", *causes])
        )

    def summary(self) -> list[dict[str, Any]]:
        """Return the alerts of the run, for its summary."""
        return [{"step": alert.step, **alert.fields()} for alert in self._monitor.alerts]

    def state_dict(self) -> dict[str, Any]:
        """Return the history of the metrics, the alerts, and the number of rollbacks."""
        return {"monitor": self._monitor.state_dict(), "num_rollbacks": self._num_rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; rollbacks since then still count."""
        self._monitor.load_state_dict(state["monitor"])
        self._num_rollbacks = max(self._num_rollbacks, state["num_rollbacks"])

    # The webhook

    @contextmanager
    def reporting_the_end(self) -> Iterator[None]:
        """Open the webhook, report how the block ended, and wait for the delivery at most for the webhook's timeout."""
        if self._config.webhook and self._config.enabled and self._ranks.is_main:
            self._webhook = Webhook(self._config.webhook, self._config.webhook_timeout)
        try:
            yield
            self._call_webhook("finished", "finished")
        except BaseException as error:
            event = "failed" if isinstance(error, Exception) else "interrupted"
            self._call_webhook(event, f"{event}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            raise
        finally:
            if self._webhook is not None:
                self._webhook.close()
                self._note_webhook_problems()
                self._webhook = None

    def _call_webhook(self, event: str, text: str, **fields: Any) -> None:
        if self._webhook is None:
            return
        run, step = self._run_name, self._state.global_step
        # `text` is the field that chat services show.
        self._webhook.post({"run": run, "step": step, "event": event, "text": f"{run}, step {step}: {text}", **fields})
        self._note_webhook_problems()

    def _note_webhook_problems(self) -> None:
        for problem in self._webhook.problems() if self._webhook else ():
            self._logger.note(f"watch: {problem}; the run goes on")
