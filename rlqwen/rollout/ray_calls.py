"""Call Ray so that a process of its that dies or is stopped ends the run with a message, instead of hanging or ending it.

Ray's own answer is to end the trainer at the next call, without a chance to save, or to wait for ever.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlqwen.errors import RolloutError

STOPPED_S = 15.0
"""Seconds that a process of Ray may be stopped (SIGSTOP, as by a debugger) before it counts as lost."""
_POLL_S = 0.25
_DEAD, _STOPPED = ("Z", "X"), "T"
"""States of a process in /proc/PID/stat."""


class WatchedProcesses:
    """Watch the processes that every call to a private Ray needs.

    Once one is lost, nothing may call Ray any more in this process.
    """

    def __init__(self, pids: dict[int, str]) -> None:
        """Watch processes, given as process id -> name."""
        self.is_lost = False
        self._pids = pids
        self._stopped_since: dict[int, float] = {}
        self._helpers = threading.local()

    def check(self) -> None:
        """Raise RolloutError if one of the processes is gone, or has been stopped for `STOPPED_S`."""
        for pid, name in self._pids.items():
            state = _state(pid)
            if state in _DEAD:
                self._lose(f"Ray's {name} (process {pid}) is gone; it may have been killed, or run out of memory")
            if state != _STOPPED:
                self._stopped_since.pop(pid, None)
            elif time.monotonic() - self._stopped_since.setdefault(pid, time.monotonic()) > STOPPED_S:
                self._lose(f"Ray's {name} (process {pid}) has been stopped by a signal for {STOPPED_S:g} s")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function` returns, called in a thread, which is left behind if Ray is lost meanwhile."""
        self.check()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._helper().put((function, arguments, answers))
        while True:
            try:
                value, error = answers.get(timeout=_POLL_S)
            except queue.Empty:
                self.check()
                continue
            if error is not None:
                self.check()  # it may be no more than a consequence
                raise error
            return value

    def _helper(self) -> "queue.SimpleQueue[Any]":
        """Return the queue of the thread that calls for this thread."""
        if not hasattr(self._helpers, "calls"):
            self._helpers.calls = queue.SimpleQueue()
            thread = threading.Thread(target=_serve, args=(self._helpers.calls,), daemon=True, name="rlqwen-ray")
            thread.start()
        calls: queue.SimpleQueue[Any] = self._helpers.calls
        return calls

    def _lose(self, what: str) -> None:
        if not self.is_lost:
            self.is_lost = True
            import ray

            atexit.unregister(ray.shutdown)  # it would wait for what is gone
        raise RolloutError(f"{what}; without it no rollout worker can be reached")


def _serve(calls: "queue.SimpleQueue[Any]") -> None:
    while True:
        function, arguments, answers = calls.get()
        try:
            answers.put((function(*arguments), None))
        except BaseException as error:  # noqa: BLE001  the caller raises it
            answers.put((None, error))
        del function, arguments, answers


def _state(pid: int) -> str:
    """Return the state of a process as a letter; Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "Z" if Path("/proc/self").exists() else "?"
