"""What lies in a run folder, and the refusal to write over a run."""

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

from rlqwen.errors import ConfigError
from rlqwen.run_folder.lock import refuse_running

RECIPE_FILE = "recipe.yaml"
FINAL_FOLDER = "final"
CHECKPOINTS_FOLDER = "checkpoints"
COMPLETIONS_FOLDER = "completions"
METRICS_FILE = "metrics.jsonl"
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


RUN_MARKER = ".rlqwen-run"
"""A file that a run puts into its folder when that holds none of RUN_FILES; what is named so there later is a run's own."""
KEPT_RECIPE = ".recipe-before.yaml"
"""The recipe of the run that was there before, until that run is moved aside."""
_BESIDE = ("curves.png", ERROR_FILE, "restarts.jsonl")
"""What is moved aside with RUN_FILES."""


def mark_run_folder(folder: Path) -> None:
    """Mark the folder as a run's, unless it holds files of the same names that no run wrote."""
    if not find_run_files(folder):
        (folder / RUN_MARKER).touch()


def move_run_aside(folder: Path) -> Path | None:
    """Move the files of an earlier run into `previous-N` of the folder, and return that; None if there are none."""
    if not find_run_files(folder):
        return None
    refuse_unmarked(folder)
    number = next(number for number in range(1, 1_000_000) if not (folder / f"previous-{number}").exists())
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for name in (*RUN_FILES, *_BESIDE):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    if (folder / KEPT_RECIPE).exists():
        (folder / KEPT_RECIPE).rename(aside / RECIPE_FILE)
    return aside


def refuse_unmarked(path: str | Path) -> None:
    """Raise ConfigError if the folder holds files under a run's names that no run wrote."""
    found = find_run_files(path)
    if found and not (Path(path) / RUN_MARKER).exists():
        raise ConfigError(
            f"output_dir {str(path)!r} holds {', '.join(found)}, but no run of rlqwen wrote that, or an early version did "
            f"(there is no {RUN_MARKER} beside it), so it is not moved aside: choose another folder, or move it away yourself"
        )


def refuse_needed_inside(path: str | Path, needed: Mapping[str, str]) -> None:
    """Raise ConfigError if the run needs something that is in the folder that it will clear.

    `needed`: key of the config -> file or folder that it names; what is not there is passed over.
    """
    folder = Path(path).resolve()
    for key, name in needed.items():
        there = Path(name)
        with contextlib.suppress(OSError, RuntimeError):  # no file's name, or no user's home
            there = there.expanduser().resolve()
        if there.is_relative_to(folder) and there.exists():
            raise ConfigError(
                f"{key} {name[:200]!r} lies in output_dir {str(path)!r}, which train.overwrite_output_dir=true clears: "
                "choose another output_dir, or move it out of there"
            )


def refuse_used_folder(path: str | Path, *, overwrite: bool, apart_from: Collection[str] = ()) -> None:
    """Raise ConfigError if the folder holds a run and may not be overwritten, or a run that still goes on.

    `apart_from`: files that are no sign of a run here. `overwrite`: the run there may be moved aside, or gone on with.
    """
    refuse_running(path)
    found = [name for name in find_run_files(path) if name not in apart_from]
    if found and not overwrite:
        raise ConfigError(
            f"output_dir {str(path)!r} holds a run already (found {', '.join(found)}): choose another folder, "
            "go on from its last checkpoint with --resume, or set train.overwrite_output_dir=true to move that run "
            "aside and start again"
        )


def find_run_files(path: str | Path) -> list[str]:
    """What a run left in the folder."""
    return [name for name in RUN_FILES if (Path(path) / name).exists()]
