"""Name the files of a run folder, move an earlier run aside, and refuse to overwrite one."""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from rlqwen.config.usable_values import real_path
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
"""Files that exist only if a run has started in the folder."""


WRITTEN_BY_EVALUATION = ("completions", "reward_failures")
"""Files that an evaluation before training may also write."""


RUN_MARKER = ".rlqwen-run"
"""File that a run creates in a folder without RUN_FILES, so that RUN_FILES found there later are known to be a run's."""
KEPT_RECIPE = ".recipe-before.yaml"
"""Recipe of the earlier run in the folder, until that run is moved aside."""
_PREVIOUS = "previous-"
_ALSO_MOVED = ("curves.png", ERROR_FILE, "restarts.jsonl")
"""Files that are moved aside together with RUN_FILES."""


def mark_run_folder(folder: Path) -> None:
    """Mark the folder as a run's, unless it holds RUN_FILES already."""
    if not find_run_files(folder):
        (folder / RUN_MARKER).touch()


def move_run_aside(folder: Path) -> Path | None:
    """Move the files of an earlier run to `previous-N` in the folder and return that path; None if there are none."""
    if not find_run_files(folder):
        return None
    refuse_unmarked(folder)
    homes = {folder, *(real_path(folder / name) for name in RUN_FILES if _is_linked_folder(folder / name))}
    number = next(n for n in range(1, 1_000_000) if not any((home / f"{_PREVIOUS}{n}").exists() for home in homes))
    aside = folder / f"{_PREVIOUS}{number}"
    aside.mkdir()
    for name in (*RUN_FILES, *_ALSO_MOVED):
        if _is_linked_folder(folder / name):
            _move_inside_link(folder / name, aside / name)
        elif (folder / name).exists():
            (folder / name).rename(aside / name)
    if (folder / KEPT_RECIPE).exists():
        (folder / KEPT_RECIPE).rename(aside / RECIPE_FILE)
    return aside


def _is_linked_folder(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _move_inside_link(link: Path, aside: Path) -> None:
    """Move what a linked folder holds aside on its own disk; the link stays for the next run, and `aside` links to it."""
    home = real_path(link)
    moved = home / aside.parent.name
    moved.mkdir()
    for entry in list(home.iterdir()):
        if not entry.name.startswith(_PREVIOUS):
            entry.rename(moved / entry.name)
    aside.symlink_to(moved)


def is_inside(path: Path, run_dir: Path) -> bool:
    """Return whether a path lies in a run folder, or in a folder on another disk that its `checkpoints` links to."""
    homes = (real_path(run_dir), real_path(run_dir / CHECKPOINTS_FOLDER))
    return any(real_path(path).is_relative_to(home) for home in homes)


def refuse_unmarked(path: str | Path) -> None:
    """Raise ConfigError if the folder holds RUN_FILES that no run wrote."""
    found = find_run_files(path)
    if found and not (Path(path) / RUN_MARKER).exists():
        raise ConfigError(
            f"output_dir {str(path)!r} holds {', '.join(found)}, but no run of rlqwen wrote that, or an early version did "
            f"(there is no {RUN_MARKER} beside it), so it is not moved aside: choose another folder, or move it yourself"
        )


def refuse_needed_inside(path: str | Path, needed: Mapping[str, str]) -> None:
    """Raise ConfigError if the run needs a file in the folder that it is going to clear.

    `needed`: key of the config -> file or folder that it names; missing ones are ignored.
    """
    for key, name in needed.items():
        there = Path(name)
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # not a valid path, or no home directory
            there = real_path(there.expanduser())
        if os.path.exists(there) and is_inside(there, Path(path)):  # noqa: PTH110 - False for what is no path
            raise ConfigError(
                f"{key} {name[:200]!r} lies in output_dir {str(path)!r}, which train.overwrite_output_dir=true clears: "
                "choose another output_dir, or move the file elsewhere"
            )


def refuse_used_folder(path: str | Path, *, overwrite: bool, apart_from: Collection[str] = ()) -> None:
    """Raise ConfigError if a run is in progress in the folder, or if it holds a run and `overwrite` is False.

    `overwrite`: the run there may be moved aside or resumed. `apart_from`: files that do not count as a run.
    """
    refuse_running(path)
    found = [name for name in find_run_files(path) if name not in apart_from]
    if found and not overwrite:
        raise ConfigError(
            f"output_dir {str(path)!r} holds a run already (found {', '.join(found)}): choose another folder, "
            "resume from its last checkpoint with --resume, or set train.overwrite_output_dir=true to move that run "
            "aside and start again"
        )


def find_run_files(path: str | Path) -> list[str]:
    """Return which RUN_FILES the folder holds; a folder for checkpoints counts if it holds any."""
    return [name for name in RUN_FILES if _is_of_run(Path(path) / name)]


def _is_of_run(path: Path) -> bool:
    if path.name != CHECKPOINTS_FOLDER or not path.is_dir():
        return path.exists()
    return any(not entry.name.startswith(_PREVIOUS) for entry in path.iterdir())
