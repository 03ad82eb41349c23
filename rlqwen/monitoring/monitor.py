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
    diagnosis: Diagnosis
    action: Action

    def fields(self) -> dict[str, Any]:
        """What is written down and sent: plain values."""
        return {
            "symptom": self.symptom,
            "value": self.diagnosis.value,
            "threshold": self.diagnosis.threshold,
            "cause": self.diagnosis.cause,
            "advice": self.diagnosis.advice,
            "action": self.action,
        }

    @property
    def text(self) -> str:
        """For people: one line, and one for each piece of advice."""
        diagnosis = self.diagnosis
        head = (
            f"watch: {self.symptom} at step {self.step} ({diagnosis.value:.4g}, threshold {diagnosis.threshold:.4g}): "
            f"{diagnosis.cause}"
        )
        return "\n".join([head, *(f"watch:   {line}" for line in diagnosis.advice)])


class Monitor:
    """Follows a run by its metrics.

    Example:
        guard = Monitor(args)
        for alert in guard.observe(step, metrics):
            print(alert.text)
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
        self.alerts: list[Alert] = []
        """All of the run, in order."""
        self.cleared: list[str] = []
        """Symptoms that the last step was found free of."""

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Look at a step; returns the symptoms that are told now."""
        self.cleared = []
        if not self._config.enabled:
            return []
        seen = Step(metrics, self._history, self._args)
        alerts = []
        for name, find in SYMPTOMS.items():
            limits: SymptomConfig | None = getattr(self._config, name)
            if limits is None:
                continue
            diagnosis = find(limits, seen)
            if self._is_news(name, limits, diagnosis) and diagnosis is not None:
                alerts.append(Alert(step, name, diagnosis, limits.action or self._config.action))
        followed = {key: metrics[key] for key in ("entropy", "completions/mean_length") if key in metrics}
        self._history.add(followed | gradient_norms(metrics))
        self.alerts += alerts
        return alerts

    def _is_news(self, name: str, limits: SymptomConfig, diagnosis: Diagnosis | None) -> bool:
        """Count, and say whether the symptom has lasted long enough and has not been told."""
        if diagnosis is None:
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

    def reset_symptoms(self) -> None:
        """What was seen belongs to weights that are gone, and is told anew if it comes back."""
        self._shown, self._absent = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to be watched as if it had not been cut; as JSON can hold it."""
        return {"history": self._history.state_dict(), "shown": self._shown, "absent": self._absent} | {
            "alerts": [asdict(alert) for alert in self.alerts]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._history.load_state_dict(state["history"])
        self._shown, self._absent = dict(state["shown"]), dict(state["absent"])
        self.alerts = [Alert(**alert | {"diagnosis": Diagnosis(**alert["diagnosis"])}) for alert in state["alerts"]]


def worst_action(alerts: Iterable[Alert]) -> Action | None:
    """The most severe of what the alerts ask for; None where there are none."""
    actions = [alert.action for alert in alerts]
    return max(actions, key=_SEVERITY.index) if actions else None
