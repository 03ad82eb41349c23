"""Log the metrics, notes and events of a run: to files, metric services, the display and callbacks."""

from pathlib import Path
from typing import Any

from transformers import TrainerState

from rlqwen.config import TrainerConfig
from rlqwen.reporting import MetricLogger
from rlqwen.run_folder.layout import METRICS_FILE
from rlqwen.trainers.callbacks import Callbacks

Metrics = dict[str, float]


class RunLogger:
    """Log from the main rank; on other ranks, only append to the state's history and call callbacks."""

    def __init__(
        self,
        output_dir: Path,
        args: TrainerConfig,
        *,
        algorithm: str,
        state: TrainerState,
        callbacks: Callbacks,
        is_main: bool,
    ) -> None:
        self._output_dir = output_dir
        self._args = args
        self._algorithm = algorithm
        self._state = state
        self._callbacks = callbacks
        self._is_main = is_main
        self._sink: MetricLogger | None = None
        """Open while training."""
        self.pending_notes: list[str] = []
        """Notes from before the sink was open; it shows them first."""

    def open(self) -> None:
        """Open files, metric services and the display, and show the pending notes."""
        if not self._is_main:
            return
        self._sink = MetricLogger(
            self._output_dir,
            report_to=self._args.report_to,
            run_name=self._args.run_name,
            display=False if self._args.disable_tqdm else None,
            total_steps=self._state.max_steps,
            algorithm=self._algorithm,
            resumed_at=self._state.global_step or None,
        )
        for text in self.pending_notes:
            self._sink.note(text)
        self.pending_notes.clear()

    def close(self) -> None:
        """Flush and close the sinks; may be called twice."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def log(self, metrics: Metrics) -> None:
        """Log the metrics of the current update."""
        if self._sink is not None:
            self._sink.log(self._state.global_step, metrics)
        self._state.log_history.append({"step": self._state.global_step, **metrics})
        self._callbacks.notify("on_log", logs=metrics)

    def note(self, text: str) -> None:
        """Tell the user something, in one line."""
        if not self._is_main:
            return
        if self._sink is None:
            self.pending_notes.append(text)
        else:
            self._sink.note(text)

    def event(self, fields: dict[str, Any]) -> None:
        """Write a line of its own to the metrics file, such as an alert."""
        if self._sink is not None:
            self._sink.event(self._state.global_step, fields)

    def state_dict(self) -> dict[str, int]:
        """Return the present size of the metrics file in bytes, to which a resumed run truncates it."""
        metrics = self._output_dir / METRICS_FILE
        return {"metrics_bytes": metrics.stat().st_size if metrics.is_file() else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore nothing: files are truncated by the checkpointer, and only when a run resumes in its own folder."""
