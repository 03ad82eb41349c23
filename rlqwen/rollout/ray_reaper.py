"""Ends what is left of a private Ray once the trainer is gone, however it went: `guard.py PARENT_PID FOLDER`.

A program of its own, run by path. Most of Ray's processes die with a killed driver, but its agents wait for more than a
minute for servers that are gone. They are found by the mark that they inherited, never by name.
"""

import contextlib
import os
import select
import shutil
import sys
import time

import psutil

MARK = "RLQWEN_RAY_FOLDER"
"""Environment variable that every process of a private Ray inherits; its value is the folder."""


def main(parent: int, folder: str) -> None:
    """Wait until the trainer closes our stdin or is gone; then kill what carries its mark and remove its folder."""
    # A child that the trainer forked may hold our stdin open, so the parent is watched as well.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 0.5)[0]:
        pass
    # Ray's raylet may start a process between being seen and being killed.
    while _kill_marked(folder):
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _kill_marked(folder: str) -> int:
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == folder:
                process.kill()
                count += 1
    return count


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
