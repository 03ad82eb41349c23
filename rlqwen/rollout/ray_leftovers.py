"""Clear what a killed run's private Ray left behind: its processes, shared memory and folder."""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO

from rlqwen.rollout import ray_reaper as reaper

PREFIX = "rlq-"
"""Begins the name of a private Ray's folder."""
_OWNER_FILE = "owner"
_YOUNG_S = 600.0
"""A folder without an owner counts as left over from this age on, in seconds; before, a run may be about to own it."""


def claim(folder: Path) -> IO[bytes]:
    """Mark `folder` as that of a living run, for as long as the file that is returned stays open."""
    # A lock, and no process id, because containers that share a temporary folder do not see each other's processes.
    file = (folder / _OWNER_FILE).open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def clear_leftovers(base: Path) -> None:
    """Remove folders of this user's killed runs below `base`, with what still runs or lies in memory for them."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and folder.is_dir() and not _is_alive(folder):
                reaper.end_processes(str(folder))
                reaper.remove_segments(str(folder))
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    try:
        with (folder / _OWNER_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return time.time() - folder.lstat().st_mtime < _YOUNG_S
    except BlockingIOError:
        return True
    return False
