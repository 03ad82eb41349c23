"""Watch the metrics of a run, and raise one alert per symptom that lasts."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlqwen.config import TrainerConfig
from rlqwen.config.watch import Action, SymptomConfig
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep
from rlqwen.monitoring.metric_history import MetricHistory
from rlqwen.monitoring.symptoms import SYMPTOMS
from rlqwen.monitoring.update_symptoms import gradient_norms

_SEVERITY: tuple[Action, ...] = ("warn", "rollback", "stop")


@dataclass(slots=True, frozen=True)
class Alert:
    """Report a symptom that has lasted too long."""

    step: int
    symptom: str
    diagnosis: Diagnosis
    action: Action

    def fields(self) -> dict[str, Any]:
        """Return the alert as JSON values, for metrics and webhooks."""
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
        """Return the alert as text: a headline, then one line per piece of advice."""
        diagnosis = self.diagnosis
        head = (
            f"watch: {self.symptom} at step {self.step} ({diagnosis.value:.4g}, threshold {diagnosis.threshold:.4g}): "
            f"{diagnosis.cause}"
        )
        return "\n".join([head, *(f"watch:   {line}" for line in diagnosis.advice)])


class Monitor:
    """Watch a run through its metrics, as `train.watch` configures.

    Example:
        monitor = Monitor(args)
        for alert in monitor.observe(step, metrics):
            print(alert.text)
    """

    def __init__(self, args: TrainerConfig) -> None:
        self._args = args
        self._config = args.watch
        window = self._config.grad_norm.window if self._config.grad_norm else 1
        self._history = MetricHistory(self._config.start_steps, window)
        self._present: dict[str, int] = {}
        """Symptom -> number of steps in a row with it."""
        self._absent: dict[str, int] = {}
        """Symptom that has an alert -> number of steps in a row without it."""
        self.alerts: list[Alert] = []
        """All alerts of the run, in order."""
        self.cleared: list[str] = []
        """Symptoms that ended at the last step."""

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Check a step and return the alerts that it raises."""
        self.cleared = []
        if not self._config.enabled:
            return []
        observed = ObservedStep(metrics, self._history, self._args)
        alerts = []
        for name, find in SYMPTOMS.items():
            limits: SymptomConfig | None = getattr(self._config, name)
            if limits is None:
                continue
            diagnosis = find(limits, observed)
            if self._is_new(name, limits, diagnosis) and diagnosis is not None:
                alerts.append(Alert(step, name, diagnosis, limits.action or self._config.action))
        followed = {key: metrics[key] for key in ("entropy", "completions/mean_length") if key in metrics}
        self._history.add(followed | gradient_norms(metrics))
        self.alerts += alerts
        return alerts

    def _is_new(self, name: str, limits: SymptomConfig, diagnosis: Diagnosis | None) -> bool:
        """Count the step, and return whether the symptom has lasted long enough and has no alert yet."""
        if diagnosis is None:
            self._present[name] = 0
            if name in self._absent:
                self._absent[name] += 1
                if self._absent[name] >= self._config.clear_steps:
                    del self._absent[name]
                    self.cleared.append(name)
            return False
        self._present[name] = self._present.get(name, 0) + 1
        has_alert = name in self._absent
        if has_alert or self._present[name] >= limits.steps:
            self._absent[name] = 0
            return not has_alert
        return False

    def reset_symptoms(self) -> None:
        """Forget present symptoms after a rollback, so that one that comes back raises an alert again."""
        self._present, self._absent = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return history, symptoms and alerts as JSON values."""
        return {
            "history": self._history.state_dict(),
            "present": self._present,
            "absent": self._absent,
            "alerts": [asdict(alert) for alert in self.alerts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state saved by `state_dict`."""
        self._history.load_state_dict(state["history"])
        self._present, self._absent = dict(state["present"]), dict(state["absent"])
        self.alerts = [Alert(**alert | {"diagnosis": Diagnosis(**alert["diagnosis"])}) for alert in state["alerts"]]


def worst_action(alerts: Iterable[Alert]) -> Action | None:
    """Return the most severe action of the alerts; None without alerts."""
    actions = [alert.action for alert in alerts]
    return max(actions, key=_SEVERITY.index) if actions else None
