"""Ends what is left of a private Ray once the trainer is gone, however it went: `ray_reaper.py PARENT_PID FOLDER`.

A program of its own, run by path. Most of Ray's processes die with a killed driver, but its agents wait for more than a
minute for servers that are gone. They are found by the mark that they inherited, never by name. Shared memory that they
have mapped outlives them, so its names are written down while they live.
"""

import contextlib
import os
import select
import shutil
import sys
import time
from pathlib import Path

import psutil

MARK = "RLQWEN_RAY_FOLDER"
"""Environment variable that every process of a private Ray inherits; its value is the folder."""
_SHARED_MEMORY = "/dev/shm/"
_SEGMENTS_FILE = "segments"
_RECORD_S = 10.0
"""Seconds between two looks at the segments of shared memory."""
TOLD = b"."
"""What the trainer writes to our stdin if it closes Ray itself, or has reported that Ray is lost."""
_RAYLET_DIED = (
    "rlqwen: Ray's raylet died while the trainer (process {}) used its object store, and Ray ended the trainer: go on from "
    "the last checkpoint with --resume"
)


def main(parent: int, folder: str) -> None:
    """Wait until the trainer closes our stdin or is gone; then kill what carries its mark and remove its folder."""
    recorded, is_told = time.monotonic(), False
    # A child that the trainer forked may hold our stdin open, so the parent is watched as well.
    while os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0]:
            if not os.read(0, 1):
                break
            is_told = True
        if time.monotonic() - recorded > _RECORD_S:
            record_segments(folder)
            recorded = time.monotonic()
    # In the middle of a call to its object store, Ray ends the trainer on the spot if the raylet dies.
    if not is_told and not any(process.name() == "raylet" for process in _marked(folder)):
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(sys.stderr.fileno(), f"{_RAYLET_DIED.format(parent)}\n".encode())
    end_processes(folder)
    remove_segments(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end_processes(folder: str) -> None:
    """Kill the processes of the private Ray in `folder`, after their shared memory is recorded."""
    record_segments(folder)
    # Ray's raylet may start a process between being seen and being killed.
    while marked := _marked(folder):
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def record_segments(folder: str) -> None:
    """Add the names of the shared memory that the processes have mapped to a file in `folder`."""
    names = set()
    for process in _marked(folder):
        with contextlib.suppress(psutil.Error, OSError):
            names |= {each.path for each in process.memory_maps() if each.path.startswith(_SHARED_MEMORY)}
    with contextlib.suppress(OSError):
        known = _recorded(folder)
        if not names <= known:
            (Path(folder) / _SEGMENTS_FILE).write_text("\n".join(sorted(names | known)), "utf-8")


def remove_segments(folder: str) -> None:
    """Remove the recorded shared memory that is still there."""
    with contextlib.suppress(OSError):
        for name in _recorded(folder):
            with contextlib.suppress(OSError):
                if name.startswith(_SHARED_MEMORY) and os.lstat(name).st_uid == os.getuid():
                    Path(name).unlink()


def _recorded(folder: str) -> set[str]:
    path = Path(folder) / _SEGMENTS_FILE
    return set(path.read_text("utf-8").splitlines()) if path.exists() else set()


def _marked(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == folder:
                found.append(process)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
