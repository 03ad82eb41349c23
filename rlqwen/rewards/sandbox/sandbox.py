"""The boundary around an isolated reward worker, and the tighter one around programs that it runs.

Isolated: no network, nothing written, no environment of the user's, no file read but Python, its packages and the
system's libraries, no other process reached; all that the worker starts is under the same rules. Two mechanisms that
need no root and work in containers make it: Landlock for files, seccomp for system calls. A worker tries the boundary
before it loads a reward, and does not serve if it fails to hold.

Confined, for the programs that an isolated reward runs: moreover no new process or thread, no signal to any other
process, and no file of the reward's own either.
"""

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlqwen.rewards.sandbox import landlock, seccomp

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
_BOOTSTRAP = "import sys; sys.path.insert(0, sys.argv[1]); from rlqwen.rewards.sandbox.sandbox import run_confined"
_BOOTSTRAP += "; run_confined(sys.argv[2:])"


_PROBE = """
import os, sys
sys.path[:] = sys.argv[1:]
from rlqwen.rewards.sandbox.sandbox import isolate
try: isolate(os.getppid())
except OSError as error: sys.exit(str(error))
"""
_PROBE_WAIT_S = 60.0


def why_not() -> str | None:
    """Why a worker can't be isolated here, in words; None if it can: it is tried, in a process of its own."""
    command = [sys.executable, "-c", _PROBE, *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer after {_PROBE_WAIT_S:g} s"
    return None if done.returncode == 0 else done.stderr.strip()[-500:]


def refusal(rewards: Sequence[str], reason: str) -> str:
    """Message of the error for rewards that must run isolated where they can't."""
    return (
        f"{', '.join(rewards)} must run isolated, which this machine does not allow: {reason}. It takes Linux on x86-64 "
        "or aarch64 with seccomp and Landlock (5.13 or newer; in a container, a profile that allows them). To run it "
        "all the same with nothing but limits around it: scoring.isolation: off"
    )


def minimal_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What an isolated worker gets to see of `environment`: language and time zone."""
    return _FIXED | {name: environment[name] for name in _KEPT if name in environment}


def isolate(trainer_pid: int) -> None:
    """Put this process, and all that it will start, behind the boundary for good, and try whether it holds.

    Raises OSError, saying what is missing, where it can't be had or doesn't hold.
    """
    if sys.platform != "linux":
        raise OSError(f"it needs Linux, and this is {sys.platform}")
    seccomp.forbid_new_privileges()
    whole, listed = _where_code_is()
    landlock.restrict([*python_folders(), *whole], listed)
    seccomp.install(seccomp.isolating_filter([trainer_pid, os.getppid()]))
    _try(trainer_pid)


def confined_python() -> list[str]:
    """Start of a command line for `[*confined_python(), script, *arguments]`: the script runs confined."""
    root = str(Path(__file__).parents[3])
    return [sys.executable, "-I", "-c", _BOOTSTRAP, root]


def run_confined(arguments: Sequence[str]) -> None:
    """Run the Python script `arguments[0]` in this process, confined. Must be isolated already."""
    script = arguments[0]
    seccomp.forbid_new_privileges()
    landlock.restrict([*python_folders(), script])
    seccomp.install(seccomp.confining_filter(os.getpid()))
    del sys.path[0]
    sys.argv[:] = arguments
    runpy.run_path(script, run_name="__main__")


def python_folders() -> list[str]:
    """Where the interpreter, its library and what is installed in its environment lie."""
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    return [folder for folder in dict.fromkeys(prefixes) if Path(folder) not in (Path("/"), Path.home())]


def _where_code_is() -> tuple[list[str], list[str]]:
    """What of the other folders of `sys.path` may be read, and the folders, whose names may be listed.

    Of a folder such as the project's only modules and packages, not data that lie beside them.
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


def _try(trainer_pid: int) -> None:
    """Attempt what must not be possible."""
    name = f"rlqwen-isolation-{os.getpid()}"
    for folder in dict.fromkeys(("/tmp", "/var/tmp", "/dev/shm", str(Path.cwd()))):
        path = Path(folder) / name
        _expect_refusal(f"a file was written in {folder}", lambda path=path: _write(path))  # type: ignore[misc]
    _expect_refusal("a network socket was opened", lambda: socket.socket(socket.AF_INET).close())
    _expect_refusal("a local socket was opened", lambda: socket.socket(socket.AF_UNIX).close())
    _expect_refusal("the root folder was read", lambda: list(Path("/").iterdir()))
    _expect_refusal("the trainer's environment was read", lambda: Path(f"/proc/{trainer_pid}/environ").read_bytes())
    _expect_refusal("the trainer was reached by a signal", lambda: os.kill(trainer_pid, 0))


def _write(path: Path) -> None:
    path.write_text("")
    path.unlink()


def _expect_refusal(success: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except OSError:
        return
    raise OSError(f"the boundary does not hold: {success}")
