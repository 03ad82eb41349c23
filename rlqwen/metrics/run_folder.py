"""What lies in a run folder, and the refusal to write over a run."""

from collections.abc import Collection
from pathlib import Path

from rlqwen.errors import ConfigError
from rlqwen.metrics.run_lock import refuse_running

RECIPE_FILE = "recipe.yaml"
FINAL_FOLDER = "final"
CHECKPOINTS_FOLDER = "checkpoints"
ERROR_FILE = "error.log"
RUN_FILES = (
    "metrics.jsonl",
    "completions",
    CHECKPOINTS_FOLDER,
    FINAL_FOLDER,
    "summary.json",
    "nonfinite",
    "reward_failures",
    "data_cleaning.json",
    "data_dropped.jsonl",
)
"""What only a run that began leaves behind."""


WRITTEN_BY_EVALUATION = ("completions", "reward_failures")
"""What an evaluation before training leaves there, too."""


def refuse_used_folder(path: str | Path, *, overwrite: bool, apart_from: Collection[str] = ()) -> None:
    """Raises ConfigError if the folder holds a run and may not be overwritten, or one that is still going on.

    `apart_from`: files that are no sign of a run here.
    """
    refuse_running(path)
    found = [name for name in find_run_files(path) if name not in apart_from]
    if found and not overwrite:
        raise ConfigError(
            f"output_dir {str(path)!r} holds a run already (found {', '.join(found)}): choose another folder, "
            "go on from its last checkpoint with --resume, or set train.overwrite_output_dir=true to delete that run and "
            "start anew"
        )


def find_run_files(path: str | Path) -> list[str]:
    """What a run left in the folder."""
    return [name for name in RUN_FILES if (Path(path) / name).exists()]
