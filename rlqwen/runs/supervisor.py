"""Run a command that trains, and start it again from its last checkpoint when it dies.

The supervisor knows only a command line, the run folders that it writes, and exit codes; the command may start several
ranks or none.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rlqwen.errors import WatchStop
from rlqwen.reporting import read_metrics
from rlqwen.reporting.summary import SUMMARY_FILE
from rlqwen.run_folder.layout import ERROR_FILE
from rlqwen.terminal import echo, json_text

RESTARTS_FILE = "restarts.jsonl"
SUPERVISED = "RLQWEN_SUPERVISOR"
"""Environment variable that holds the supervisor's process id, so that a child knows that it has a supervisor."""
FINAL_CODES = {0: "done", 2: "the input is wrong", 75: "saved and left on a signal", 130: "interrupted"}
"""Exit codes after which there is nothing to restart."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RestartPolicy:
    """Say how often to restart a command, and after what pause."""

    max_restarts: int
    max_stalls: int = 3
    """Deaths in a row at the same step after which to give up."""
    backoff_s: float = 1.0
    """Seconds before the first restart; each further one waits twice as long."""
    max_backoff_s: float = 60.0
    """The longest pause in seconds."""


def is_supervised() -> bool:
    """Return whether the parent process is a supervisor."""
    return os.environ.get(SUPERVISED) == str(os.getppid())


def supervise_command_line(arguments: Sequence[str], run_dirs: Sequence[str | Path], policy: RestartPolicy) -> int:
    """Supervise rlqwen with the arguments that it was started with; returns the exit code as a shell would give it."""

    def announce(text: str) -> None:
        echo(f"rlqwen: {text}", err=True)

    code = supervise([sys.executable, "-P", "-m", "rlqwen", *arguments], run_dirs, policy, announce)
    return code if code >= 0 else 128 - code


def supervise(
    command: Sequence[str], run_dirs: Sequence[str | Path], policy: RestartPolicy, announce: Callable[[str], None]
) -> int:
    """Run `command` to its end; returns the exit code of its last process.

    A process that dies by a signal, or with a code that is not final, is started again with `resume=auto` added:
    finished recipes are skipped, and the others resume from their last checkpoint. Signals are passed on, and end the
    supervision. Each restart is a line in `restarts.jsonl` of the current run folder.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    with _Child() as child:
        stalls, reached = 0, None
        for restart in range(policy.max_restarts + 1):
            code = child.run([*command, "resume=auto"] if restart else command)
            if code in FINAL_CODES or child.asked_to_stop:
                return code
            now = _furthest(folders)
            stalls, reached = (stalls + 1 if now == reached else 1), now
            reason = _reason_to_give_up(folders, policy, restart, stalls, child.started)
            how = f"the run died: {describe_exit(code)}"
            if reason:
                announce(f"{how}; not restarted: {reason}")
                return code
            delay = min(policy.backoff_s * 2**restart, policy.max_backoff_s)
            start = _start_of_next(folders)
            announce(f"{how}; restart {restart + 1} of {policy.max_restarts} in {delay:g} s, {start}")
            _write_down(folders, {"restart": restart + 1, "of": policy.max_restarts, "died": describe_exit(code),
                                  "last_step": now[1], "start": start})  # fmt: skip
            if not child.wait(delay):
                return 130 if int(child.asked_to_stop) == signal.SIGINT else 75
    raise AssertionError("the last attempt returns")


class _Child:
    """Run one process at a time, in a process group of its own, so that it gets each signal once: from here."""

    def __init__(self) -> None:
        self.asked_to_stop = 0
        """The last signal that was passed on."""
        self.started = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # by nohup, say
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run it to its end, and return the exit code, which is negative if a signal ended it."""
        self.started = time.time()
        environment = os.environ | {SUPERVISED: str(os.getpid())}
        self._process = subprocess.Popen(command, env=environment, process_group=0)
        try:
            return self._process.wait()
        finally:
            self._process = None

    def wait(self, seconds: float) -> bool:
        """Wait, unless asked to stop; return whether to go on."""
        deadline = time.monotonic() + seconds
        while not self.asked_to_stop and time.monotonic() < deadline:
            time.sleep(min(0.1, seconds))
        return not self.asked_to_stop

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def end_with_supervisor() -> None:
    """Have this process get SIGTERM, on which a run saves and leaves, if its supervisor is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def describe_exit(code: int) -> str:
    """Return a description of an exit code, such as `killed by SIGKILL` or `exit code 1`."""
    number = -code if code < 0 else code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


def _reason_to_give_up(
    folders: Sequence[Path], policy: RestartPolicy, restart: int, stalls: int, started: float
) -> str | None:
    if any(_monitor_stopped(folder, started) for folder in folders):
        return "its monitor (train.watch) stopped it, and would again"
    if stalls >= policy.max_stalls:
        return f"it died {stalls} times in a row at the same step; fix the cause, then --resume"
    return (
        f"it has been restarted as often as --max-restarts={restart} allows" if restart == policy.max_restarts else None
    )


def _monitor_stopped(folder: Path, started: float) -> bool:
    path = folder / ERROR_FILE
    return path.is_file() and path.stat().st_mtime >= started - 1 and WatchStop.__name__ in path.read_text("utf-8")


def _furthest(folders: Sequence[Path]) -> tuple[int, int]:
    """Return the number of finished recipes, and the last checkpoint or logged step of the one that was trained."""
    finished = sum((folder / SUMMARY_FILE).is_file() for folder in folders)
    folder = _current(folders)
    steps = [int(line["step"]) for line in read_metrics(folder)[-1:]]
    return finished, max([*steps, *_checkpoint_steps(folder)], default=0)


def _current(folders: Sequence[Path]) -> Path:
    """Return the first run folder that is not finished."""
    return next((folder for folder in folders if not (folder / SUMMARY_FILE).is_file()), folders[-1])


def _checkpoint_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    return [int(name) for name in names if name.isdigit()]


def _start_of_next(folders: Sequence[Path]) -> str:
    steps = _checkpoint_steps(_current(folders))
    return (
        f"from the checkpoint of step {max(steps)}" if steps else "from the beginning, because there is no checkpoint"
    )


def _write_down(folders: Sequence[Path], line: dict[str, Any]) -> None:
    folder = _current(folders)
    if folder.is_dir():
        with (folder / RESTARTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json_text({"time": datetime.now(UTC).isoformat(timespec="seconds"), **line}) + "\n")
