"""What a run does about the symptoms that the guard finds: tell, stop, or go back to the last checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rlqwen.errors import WatchStop
from rlqwen.monitoring import Alert, Monitor, Webhook, worst_action
from rlqwen.trainers.resuming import Resuming
from rlqwen.trainers.telling import Metrics


class Watching(Resuming):
    """The part of a trainer that watches itself."""

    guard: Monitor
    _num_rollbacks = 0
    _webhook: Webhook | None = None

    def _open_watch(self) -> None:
        self.guard = Monitor(self.args)

    def _watch(self, metrics: Metrics) -> bool:
        """Look at a step that has been logged; returns whether it was undone.

        Raises WatchStop, after a checkpoint, where a symptom asks for it.
        """
        # The main rank looks, and all save, stop or go back together.
        trips = self.guard.observe(self.state.global_step, metrics) if self.ranks.is_main else []
        for symptom in self.guard.cleared:
            self._note(f"watch: {symptom} has cleared at step {self.state.global_step}")
            self._record({"watch/symptom": symptom, "watch/action": "cleared"})
        for trip in trips:
            self._note(trip.text)
            self._record({f"watch/{key}": value for key, value in trip.fields().items()})
            self._call_webhook("trip", trip.text, **trip.fields())
        action, trips = self.ranks.from_main((worst_action(trips), trips))
        if action == "rollback":
            self._roll_back(trips)
            return True
        if action == "stop":
            self._stop(trips, "a symptom asked for it")
        return False

    def _roll_back(self, trips: list[Alert]) -> None:
        """Put the last checkpoint back, and go on with the rows after those that led here."""
        if self._num_rollbacks >= self.args.watch.max_rollbacks:
            self._stop(trips, f"it was rolled back {self._num_rollbacks} times already (watch.max_rollbacks)")
        checkpoint = self.ranks.from_main(next(self._usable_checkpoints(), None) if self.ranks.is_main else None)
        if checkpoint is None:
            self._stop(trips, "there is no checkpoint to roll back to (train.save_steps)")
        self._num_rollbacks += 1
        step = self.state.global_step
        rows, earlier_s, told = self.stream.progress(), self._earlier_s, self.guard.trips
        self._put_back(checkpoint)
        self.stream.restore_progress(rows)
        self._earlier_s, self.guard.trips = earlier_s, told
        self.guard.forget_symptoms()
        self._note(f"watch: rolled back from step {step} to {checkpoint}; the rows in between are not trained on again")
        self._record({"watch/action": "rolled back", "watch/from_step": step, "watch/to_step": self.state.global_step})

    def _stop(self, trips: list[Alert], why: str) -> NoReturn:
        self.save_checkpoint()
        causes = [trip.text for trip in trips if trip.action != "warn"]
        raise WatchStop(
            "\n".join([f"the guard (train.watch) stopped the run: {why}; the state was saved first", *causes])
        )

    def progress(self) -> dict[str, Any]:
        return super().progress() | {"guard": self.guard.state_dict(), "num_rollbacks": self._num_rollbacks}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        super().restore_progress(progress)
        self.guard.load_state_dict(progress["guard"])
        self._num_rollbacks = max(self._num_rollbacks, progress["num_rollbacks"])

    def watch_summary(self) -> list[dict[str, Any]]:
        """The trips of the run, for its summary."""
        return [{"step": trip.step, **trip.fields()} for trip in self.guard.trips]

    # The webhook

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Open the webhook; tell it how the block ended, and wait for it no longer than its timeout."""
        config = self.args.watch
        if config.webhook and config.enabled and self.ranks.is_main:
            self._webhook = Webhook(config.webhook, config.webhook_timeout)
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
                self._tell_webhook_problems()
                self._webhook = None

    def _call_webhook(self, event: str, text: str, **fields: Any) -> None:
        if self._webhook is None:
            return
        run, step = self.args.run_name or self.output_dir.name, self.state.global_step
        # `text` is what chat services show.
        self._webhook.post({"run": run, "step": step, "event": event, "text": f"{run}, step {step}: {text}", **fields})
        self._tell_webhook_problems()

    def _tell_webhook_problems(self) -> None:
        for problem in self._webhook.problems() if self._webhook else ():
            self._note(f"watch: {problem}; the run goes on")

    def _record(self, fields: dict[str, Any]) -> None:
        if self.logger is not None:
            self.logger.event(self.state.global_step, fields)
