"""Measure the training time of a run across its resumes, and list the resumes."""

import time
from typing import Any


class RunHistory:
    """Remember what a run went through before this process."""

    def __init__(self) -> None:
        self.resumes: list[dict[str, Any]] = []
        """One entry per resume: the checkpoint, its step, and the changes that were accepted."""
        self.earlier_s = 0.0
        """Seconds of training before the last resume."""
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the clock of this process."""
        self._started = time.monotonic()

    @property
    def wall_time_s(self) -> float:
        """Return the seconds of training, those before a resume included."""
        return self.earlier_s + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return the time and the resumes so far."""
        return {"wall_time_s": self.wall_time_s, "resumes": self.resumes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; the clock of this process goes on."""
        self.earlier_s, self.resumes = state["wall_time_s"], state["resumes"]
