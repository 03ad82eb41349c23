"""Lock a run folder, so that only one run at a time trains in it."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from rlqwen.config.usable_values import real_path
from rlqwen.errors import ConfigError

LOCK_FILE = ".run.lock"
_held: dict[tuple[int, Path], int] = {}
"""(process id, path of the lock) -> file descriptor, so that a process may lock a folder twice."""


def lock_run_folder(folder: str | Path) -> None:
    """Lock the folder until `unlock_run_folder` or the end of this process.

    The operating system releases the lock when the process ends for any reason, so no stale lock remains. Raises
    ConfigError, which names process and host of the run that holds the lock.
    """
    path = real_path(folder) / LOCK_FILE
    if (os.getpid(), path) in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written to: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"output_dir {str(folder)!r} {_in_use(path)}") from None
    except OSError:
        os.close(descriptor)  # a file system without locks: train without one
        return
    with contextlib.suppress(OSError):  # a full disk; the lock is held nevertheless
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    _held[os.getpid(), path] = descriptor


def unlock_run_folder(folder: str | Path) -> None:
    """Release the lock, if this process holds it."""
    descriptor = _held.pop((os.getpid(), real_path(folder) / LOCK_FILE), None)
    if descriptor is not None:
        os.close(descriptor)


def refuse_running(folder: str | Path) -> None:
    """Raise ConfigError if another process trains in the folder."""
    path = real_path(folder) / LOCK_FILE
    if not path.is_file() or (os.getpid(), path) in _held:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"output_dir {str(folder)!r} {_in_use(path)}") from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _in_use(path: Path) -> str:
    try:
        owner: Any = json.loads(path.read_text("utf-8"))
        who = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"is in use: {who} is training there; wait for it, stop it, or choose another output_dir"
