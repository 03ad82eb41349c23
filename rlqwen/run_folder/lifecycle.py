"""Create the run folder, and truncate it to the checkpoint that a run resumes from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlqwen.config import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.run_folder.layout import (
    CHECKPOINTS_FOLDER,
    COMPLETIONS_FOLDER,
    METRICS_FILE,
    mark_run_folder,
    refuse_needed_inside,
    refuse_unmarked,
    refuse_used_folder,
)
from rlqwen.run_folder.lock import lock_run_folder


def open_run_folder(output_dir: str | None, default_name: str, *, overwrite: bool, resume: bool) -> Path:
    """Create and return the run folder; raise ConfigError if it already holds a run or is not writable.

    Without `output_dir`, the folder is a new one under `runs/`, or with `resume` the newest one there.

    A folder with checkpoints is accepted here, because `train` may be asked to resume from them. An earlier run is moved
    aside only when training begins, after all other checks.
    """
    if output_dir is None:
        names = [default_name, *(f"{default_name}-{number}" for number in range(2, 10_000))]
        folders = [Path("runs") / name for name in names]
        first_free = next(index for index, one in enumerate(folders) if not one.exists())
        folder = folders[max(first_free - 1, 0) if resume else first_free]
    else:
        folder = Path(output_dir)
        has_checkpoints = (folder / CHECKPOINTS_FOLDER).is_dir()
        refuse_used_folder(folder, overwrite=overwrite or resume or has_checkpoints)
        if overwrite and not resume:
            refuse_unmarked(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        mark_run_folder(folder)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written to: {error.strerror}") from error
    return folder


def open_locked_folder(config: TrainerConfig, default_name: str, needed: Mapping[str, Any]) -> Path:
    """Open the run folder of a trainer, and lock it for this process; see `open_run_folder`.

    `needed`: key of the config -> model, file or folder that it names and that a cleared run folder must not hold.
    """
    resume = bool(config.resume_from_checkpoint)
    if config.output_dir and config.overwrite_output_dir and not resume:
        names = {key: name for key, name in needed.items() if isinstance(name, str) and name}
        refuse_needed_inside(config.output_dir, names)
    folder = open_run_folder(config.output_dir, default_name, overwrite=config.overwrite_output_dir, resume=resume)
    lock_run_folder(folder)
    return folder


def truncate_run_folder(folder: Path, *, step: int, metrics_bytes: int) -> None:
    """Delete metrics and completions written after the checkpoint of update `step`, so that none appears twice.

    `metrics_bytes`: size of `metrics.jsonl` when that checkpoint was saved.
    """
    metrics = folder / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size > metrics_bytes:
        with metrics.open("r+b") as file:
            file.truncate(metrics_bytes)
    for path in (folder / COMPLETIONS_FOLDER).glob("*-*.jsonl"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) > step:
            path.unlink()
