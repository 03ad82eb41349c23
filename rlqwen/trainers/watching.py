"""What a run does about the symptoms that the guard finds: tell, stop, or go back to the last checkpoint."""

from typing import Any

from rlqwen.errors import WatchStop
from rlqwen.parallel import Ranks
from rlqwen.trainers.saving import Saving
from rlqwen.trainers.telling import Metrics
from rlqwen.watch import Guard, Trip, Webhook, worst_action


class Watching(Saving):
    """The part of a trainer that watches itself."""

    ranks: Ranks
    guard: Guard
    _webhook: Webhook | None = None

    def _open_watch(self) -> None:
        self.guard = Guard(self.args)
        config = self.args.watch
        if config.webhook and config.enabled and self.ranks.is_main:
            self._webhook = Webhook(config.webhook, config.webhook_timeout)

    def _watch(self, metrics: Metrics) -> None:
        """Look at a step that has been logged; raises WatchStop, after a checkpoint, where a symptom asks for it."""
        trips = self.guard.observe(self.state.global_step, metrics) if self.ranks.is_main else []
        for symptom in self.guard.cleared:
            self._note(f"watch: {symptom} has cleared at step {self.state.global_step}")
            self._record({"watch/symptom": symptom, "watch/action": "cleared"})
        for trip in trips:
            self._tell(trip)
        action = self.ranks.from_main(worst_action(trips))  # all ranks save, stop and go back together
        if action == "stop":
            self.save_checkpoint()
            raise WatchStop(_why("stopped", trips))

    def _tell(self, trip: Trip) -> None:
        self._note(trip.text)
        self._record({f"watch/{key}": value for key, value in trip.fields().items()})
        self._call_webhook("trip", trip.text, **trip.fields())

    def _record(self, fields: dict[str, Any]) -> None:
        if self.logger is not None:
            self.logger.event(self.state.global_step, fields)

    def watch_summary(self) -> list[dict[str, Any]]:
        """The trips of the run, for its summary."""
        return [{"step": trip.step, **trip.fields()} for trip in self.guard.trips]

    def _close_watch(self, error: BaseException | None) -> None:
        """Tell the webhook how the run ended, and wait for it no longer than its timeout."""
        if error is None:
            self._call_webhook("finished", "finished")
        else:
            first_line = str(error).partition("\n")[0]
            event = "failed" if isinstance(error, Exception) else "interrupted"
            self._call_webhook(event, f"{event}: {type(error).__name__}: {first_line}")
        if self._webhook is not None:
            self._webhook.close()
            self._tell_webhook_problems()
            self._webhook = None

    def _call_webhook(self, event: str, text: str, **fields: Any) -> None:
        if self._webhook is None:
            return
        run = self.args.run_name or self.output_dir.name
        step = self.state.global_step
        # `text` is what chat services show.
        self._webhook.post({"run": run, "step": step, "event": event, "text": f"{run}, step {step}: {text}", **fields})
        self._tell_webhook_problems()

    def _tell_webhook_problems(self) -> None:
        for problem in self._webhook.problems() if self._webhook else ():
            self._note(f"watch: {problem}; the run goes on")


def _why(outcome: str, trips: list[Trip]) -> str:
    """The trips that led to it, the most severe first."""
    asked = [trip for trip in trips if trip.action != "warn"]
    return "\n".join(
        [f"the run was {outcome} by its guard (train.watch); a checkpoint was saved", *(t.text for t in asked)]
    )
