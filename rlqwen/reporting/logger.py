"""Send a trainer's metrics, events and notes to sinks and display."""

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, SupportsFloat

from rlqwen.errors import ConfigError
from rlqwen.reporting.display import Display, LiveDisplay, PlainDisplay
from rlqwen.reporting.sinks import open_sinks

DISPLAY_VARIABLE = "RLQWEN_DISPLAY"
"""Environment variable that chooses the display if the caller does not: live, plain or off."""


class MetricLogger:
    """Send each step's metrics to `metrics.jsonl`, the sinks and the display.

    Args:
        output_dir: the run folder; `metrics.jsonl` is appended to.
        report_to: `none`, or one or more of tensorboard, wandb, trackio.
        run_name: name of the run in the sinks; None: the folder's name.
        display: True: the live panel. False: plain lines. None: what `RLQWEN_DISPLAY` says; if it is unset, the panel if
            standard output is a terminal, else plain lines.
        total_steps: updates that the run will make.
        resumed_at: the update whose checkpoint the run resumes from.

    Raises:
        ConfigError: a sink is unknown or not installed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: str | Sequence[str] = "none",
        run_name: str | None = None,
        display: bool | None = None,
        total_steps: int,
        algorithm: str,
        resumed_at: int | None = None,
    ) -> None:
        folder = Path(output_dir)
        name = run_name or folder.name
        mode = _display_mode(display)
        self._sinks = open_sinks(folder, report_to, name, resumed_at)
        self._display = _open_display(mode, total_steps, f"{algorithm} · {name}")
        # A trainer that dies without closing must not leave the cursor hidden.
        atexit.register(self.close)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Log the metrics of one step: keys `area/name`, values floats or one-element tensors."""
        values = {key: float(value) for key, value in metrics.items()}
        for sink in self._sinks:
            sink.log(step, values)
        if self._display is None:
            return
        evaluation = {key: value for key, value in values.items() if key.startswith("eval/")}
        training = {key: value for key, value in values.items() if key not in evaluation}
        if training:
            self._display.show(step, training)
        if evaluation:
            self._display.show_evaluation(step, evaluation)

    def event(self, step: int, fields: Mapping[str, str | float | list[str]]) -> None:
        """Log a separate line that is not the metrics of a step. Sinks that accept only numbers get the numbers."""
        for sink in self._sinks:
            sink.event(step, fields)

    def note(self, text: str) -> None:
        """Show a line of text beside the display."""
        if self._display:
            self._display.note(text)

    def close(self) -> None:
        """Restore the terminal and close the sinks; idempotent."""
        atexit.unregister(self.close)
        if self._display:
            self._display.close()
        for sink in self._sinks:
            sink.close()
        self._display, self._sinks = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _display_mode(display: bool | None) -> str:
    if display is not None:
        return "live" if display else "plain"
    mode = os.environ.get(DISPLAY_VARIABLE) or ("live" if sys.stdout and sys.stdout.isatty() else "plain")
    if mode not in ("live", "plain", "off"):
        raise ConfigError(f"{DISPLAY_VARIABLE}={mode!r}: must be live, plain or off")
    return mode


def _open_display(mode: str, total_steps: int, title: str) -> Display | None:
    if mode == "off":
        return None
    return LiveDisplay(total_steps, title) if mode == "live" else PlainDisplay(total_steps)
