"""Isolate a reward worker, and confine the programs that it runs even further.

An isolated process has no network, writes nothing, has none of the user's environment variables, reads only Python, its
packages and the system's libraries, and reaches no other process; everything that it starts has the same limits. Two
mechanisms that need no root and work in containers do this: Landlock for files, seccomp for system calls. A worker tests
the sandbox before it loads a reward, and does not start if the test fails.

A confined program, which an isolated reward runs, moreover starts no process or thread, sends no signal to any other
process, and does not read the reward's own files.
"""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlqwen.rewards.sandbox import confine, landlock, seccomp, signals
from rlqwen.rewards.sandbox.confine import python_folders

_KEPT = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
_FIXED = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/nonexistent",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_CODE_SUFFIXES = {".py", ".so", ".zip", ".dist-info", ".egg-info"}

_PROBE = """
import os, sys
sys.path[:] = sys.argv[1:]
from rlqwen.rewards.sandbox.sandbox import isolate
try: isolate(os.getppid())
except OSError as error: sys.exit(str(error))
"""
_PROBE_WAIT_S = 60.0
_FOREIGN_PID = 1


def unavailable_reason() -> str | None:
    """Say why a worker cannot be isolated on this machine; None if it can. Tries it in a new process."""
    command = [sys.executable, "-c", _PROBE, *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer after {_PROBE_WAIT_S:g} s"
    return None if done.returncode == 0 else done.stderr.strip()[-500:]


def unavailable_message(rewards: Sequence[str], reason: str) -> str:
    """Return the error message for rewards that must run isolated on a machine that cannot isolate them."""
    return (
        f"{', '.join(rewards)} must run isolated, which this machine does not allow: {reason}. It needs Linux on x86-64 "
        "or aarch64 with seccomp and Landlock (5.13 or newer; in a container, a profile that allows them). To run it "
        "without isolation, with resource limits only: scoring.isolation: off"
    )


def minimal_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an isolated worker: fixed values, and language and time zone from `environment`."""
    return _FIXED | {name: environment[name] for name in _KEPT if name in environment}


def isolate(trainer_pid: int, hand_over: Callable[[int], object] = os.close) -> None:
    """Isolate this process and everything that it starts, permanently, and test the sandbox.

    `hand_over` is given the file descriptor of held signals, where the kernel needs that (rlqwen.rewards.sandbox.signals).
    Once it is closed, no signal can be sent.

    Raises OSError, which says what is missing, if the sandbox is not available or the test fails.
    """
    if sys.platform != "linux":
        raise OSError(f"it needs Linux, and this is {sys.platform}")
    seccomp.forbid_new_privileges()
    if signals.must_be_held():
        hand_over(seccomp.hold_signals())
    readable, listed = _code_on_path()
    landlock.restrict([*python_folders(), *readable], listed)
    seccomp.install(seccomp.isolating_filter([trainer_pid, os.getppid()]))
    _test(trainer_pid)


def confined_python() -> list[str]:
    """Return the start of a command line, `[*confined_python(), script, *arguments]`, that runs a script confined.

    The script may be a folder with `__main__.py`; nothing else beside Python's own is readable.
    """
    return [sys.executable, "-I", str(Path(confine.__file__))]


def _code_on_path() -> tuple[list[str], list[str]]:
    """Return the readable paths in the other folders of `sys.path`, and the folders that may be listed.

    In a folder such as the project's, only modules and packages are readable, not data beside them.
    """
    readable: list[str] = []
    listed: list[str] = []
    for entry in map(Path, sys.path):
        if entry.name in ("site-packages", "dist-packages") or entry.is_file():
            readable.append(str(entry))
        elif entry.is_dir():
            listed.append(str(entry))
            readable += [str(found) for found in entry.iterdir() if _is_code(found)]
    return readable, listed


def _is_code(path: Path) -> bool:
    return path.suffix in _CODE_SUFFIXES or (path / "__init__.py").is_file()


def _test(trainer_pid: int) -> None:
    """Attempt what must not be possible; raise OSError if it succeeds."""
    name = f"rlqwen-isolation-{os.getpid()}"
    for folder in dict.fromkeys(("/tmp", "/var/tmp", "/dev/shm", str(Path.cwd()))):
        path = Path(folder) / name
        _expect_refusal(f"a file was written in {folder}", lambda path=path: _write(path))  # type: ignore[misc]
    _expect_refusal("a network socket was opened", lambda: socket.socket(socket.AF_INET).close())
    _expect_refusal("a local socket was opened", lambda: socket.socket(socket.AF_UNIX).close())
    _expect_refusal("the root folder was read", lambda: list(Path("/").iterdir()))
    _expect_refusal("the trainer's environment was read", lambda: Path(f"/proc/{trainer_pid}/environ").read_bytes())
    _expect_refusal("the trainer was reached by a signal", lambda: os.kill(trainer_pid, 0))
    _expect_refusal("another process was reached by a signal", lambda: os.kill(_FOREIGN_PID, 0))
    _expect_refusal("a file was made to signal another process", lambda: fcntl.fcntl(0, fcntl.F_SETOWN, trainer_pid))


def _write(path: Path) -> None:
    path.write_text("")
    path.unlink()


def _expect_refusal(success: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except OSError:
        return
    raise OSError(f"the sandbox does not hold: {success}")
