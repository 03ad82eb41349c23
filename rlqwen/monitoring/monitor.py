"""The guard: looks at every step, tells each symptom once, and says what is to be done."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlqwen.config import TrainerConfig
from rlqwen.config.watch import Action, SymptomConfig
from rlqwen.monitoring.history import History
from rlqwen.monitoring.symptoms import SYMPTOMS, Diagnosis, Step, gradient_norms

_SEVERITY: tuple[Action, ...] = ("warn", "rollback", "stop")


@dataclass(slots=True, frozen=True)
class Alert:
    """A symptom that has lasted for as long as it may."""

    step: int
    symptom: str
    finding: Diagnosis
    action: Action

    def fields(self) -> dict[str, Any]:
        """What is written down and sent: plain values."""
        return {
            "symptom": self.symptom,
            "value": self.finding.value,
            "threshold": self.finding.threshold,
            "cause": self.finding.cause,
            "advice": self.finding.advice,
            "action": self.action,
        }

    @property
    def text(self) -> str:
        """For people: one line, and one for each piece of advice."""
        finding = self.finding
        head = (
            f"watch: {self.symptom} at step {self.step} ({finding.value:.4g}, threshold {finding.threshold:.4g}): "
            f"{finding.cause}"
        )
        return "\n".join([head, *(f"watch:   {line}" for line in finding.advice)])


class Monitor:
    """Follows a run by its metrics.

    Example:
        guard = Monitor(args)
        for trip in guard.observe(step, metrics):
            print(trip.text)
    """

    def __init__(self, args: TrainerConfig) -> None:
        self._args = args
        self._config = args.watch
        window = self._config.grad_norm.window if self._config.grad_norm else 1
        self._history = History(self._config.start_steps, window)
        self._shown: dict[str, int] = {}
        """Steps in a row that showed a symptom."""
        self._absent: dict[str, int] = {}
        """For symptoms that were told: steps in a row without them."""
        self.trips: list[Alert] = []
        """All of the run, in order."""
        self.cleared: list[str] = []
        """Symptoms that the last step was found free of."""

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Look at a step; returns the symptoms that are told now."""
        self.cleared = []
        if not self._config.enabled:
            return []
        seen = Step(metrics, self._history, self._args)
        trips = []
        for name, find in SYMPTOMS.items():
            limits: SymptomConfig | None = getattr(self._config, name)
            if limits is None:
                continue
            finding = find(limits, seen)
            if self._is_news(name, limits, finding) and finding is not None:
                trips.append(Alert(step, name, finding, limits.action or self._config.action))
        followed = {key: metrics[key] for key in ("entropy", "completions/mean_length") if key in metrics}
        self._history.add(followed | gradient_norms(metrics))
        self.trips += trips
        return trips

    def _is_news(self, name: str, limits: SymptomConfig, finding: Diagnosis | None) -> bool:
        """Count, and say whether the symptom has lasted long enough and has not been told."""
        if finding is None:
            self._shown[name] = 0
            if name in self._absent:
                self._absent[name] += 1
                if self._absent[name] >= self._config.clear_steps:
                    del self._absent[name]
                    self.cleared.append(name)
            return False
        self._shown[name] = self._shown.get(name, 0) + 1
        told = name in self._absent
        if told or self._shown[name] >= limits.steps:
            self._absent[name] = 0
            return not told
        return False

    def forget_symptoms(self) -> None:
        """What was seen belongs to weights that are gone, and is told anew if it comes back."""
        self._shown, self._absent = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to be watched as if it had not been cut; as JSON can hold it."""
        return {"history": self._history.state_dict(), "shown": self._shown, "absent": self._absent} | {
            "trips": [asdict(trip) for trip in self.trips]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._history.load_state_dict(state["history"])
        self._shown, self._absent = dict(state["shown"]), dict(state["absent"])
        self.trips = [Alert(**trip | {"finding": Diagnosis(**trip["finding"])}) for trip in state["trips"]]


def worst_action(trips: Iterable[Alert]) -> Action | None:
    """The most severe of what the trips ask for; None where there are none."""
    actions = [trip.action for trip in trips]
    return max(actions, key=_SEVERITY.index) if actions else None
