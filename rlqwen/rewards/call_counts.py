"""Count the reward calls of a batch by status, with their times and what the rewards logged."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class CallCounts:
    """Sum up reward calls."""

    num_samples: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(reward, call status) -> number of samples."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Reward -> seconds that its calls took."""
    waited: Counter[str] = field(default_factory=Counter)
    """Reward -> seconds that the trainer waited while calls of the reward were running."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> values that rewards passed to `log_metric`."""

    def add(self, other: "CallCounts") -> None:
        """Add the counts of `other`."""
        self.num_samples.update(other.num_samples)
        self.seconds.update(other.seconds)
        self.waited.update(other.waited)
        for name, values in other.logged.items():
            self.logged.setdefault(name, []).extend(values)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        num_samples = [[*key, count] for key, count in self.num_samples.items()]
        times = {"seconds": dict(self.seconds), "waited": dict(self.waited)}
        return {"num_samples": num_samples, **times, "logged": self.logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts saved by `state_dict`."""
        self.num_samples = Counter({(reward, status): count for reward, status, count in state["num_samples"]})
        self.seconds = Counter(state["seconds"])
        self.waited = Counter(state.get("waited", {}))
        self.logged = dict(state["logged"])
