"""Write metrics to a JSONL file, and to TensorBoard, Weights & Biases or trackio if requested."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rlqwen.errors import ConfigError
from rlqwen.run_folder.layout import METRICS_FILE
from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text


class Sink(Protocol):
    """Write metrics to one destination."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, step: int, fields: Mapping[str, Any]) -> None:
        """Write an event, whose fields may be text; by default, log its numbers."""
        numbers = {key: float(value) for key, value in fields.items() if isinstance(value, int | float)}
        if numbers:
            self.log(step, numbers)

    def close(self) -> None: ...


class JsonlSink(Sink):
    """Write one JSON object per logged step, flushed at once, so that a killed run keeps its metrics.

    JSON has no NaN, so a value that is not finite is written as null, and `nonfinite` holds it as text:
    `{"step": 3, "loss": null, "nonfinite": {"loss": "nan"}}`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.event(step, metrics)

    def event(self, step: int, fields: Mapping[str, Any]) -> None:
        nonfinite = {k: str(v) for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
        line: dict[str, Any] = {"step": step, **fields, **dict.fromkeys(nonfinite)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json_text(redact_values(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink(Sink):
    """Write event files to `tensorboard/` in the run folder."""

    def __init__(self, output_dir: Path, run_name: str, resumed_at: int | None) -> None:
        # Drop what a killed run wrote after its checkpoint.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(
            str(output_dir / "tensorboard"), purge_step=purge
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """Write to a Weights & Biases run. W&B's own environment variables set project and entity."""

    def __init__(self, output_dir: Path, run_name: str, resumed_at: int | None) -> None:
        self._run = import_module("wandb").init(name=run_name, dir=str(output_dir))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink(Sink):
    """Write to a trackio run in project `rlqwen`."""

    def __init__(self, output_dir: Path, run_name: str, resumed_at: int | None) -> None:
        self._trackio = import_module("trackio")
        self._trackio.init(project="rlqwen", name=run_name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


_SINKS: dict[str, type[TensorBoardSink] | type[WandbSink] | type[TrackioSink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}


def check_sinks(report_to: str | Sequence[str]) -> list[str]:
    """Return the sinks named in `report_to`; raise ConfigError if a name is unknown or its package is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if name not in _SINKS:
            raise ConfigError(f"report_to: unknown metric sink {name!r}; known: {', '.join(_SINKS)}, none")
        try:
            import_module(name)
        except ImportError:
            raise ConfigError(f"report_to: {name!r} is not installed; install it: pip install {name}") from None
    return wanted


def open_sinks(
    output_dir: Path, report_to: str | Sequence[str], run_name: str, resumed_at: int | None = None
) -> list[Sink]:
    """Open the JSONL file and the sinks named in `report_to`.

    `resumed_at`: the update whose checkpoint the run resumes from. Raises ConfigError if a name is unknown or its package
    is not installed.
    """
    others = [_SINKS[name](output_dir, run_name, resumed_at) for name in check_sinks(report_to)]
    return [JsonlSink(output_dir / METRICS_FILE), *others]


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the logged lines of a run, in order, without an incomplete last line of a killed run."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
