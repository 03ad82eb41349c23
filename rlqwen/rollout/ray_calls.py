"""Call Ray so that a process of its that dies or is stopped ends the run with a message, instead of hanging or ending it.

Ray's own answer is to end the trainer at the next call, without a chance to save, or to wait for ever.
"""

import atexit
import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlqwen.errors import RolloutError

SILENT_S = 45.0
"""Seconds that a cluster may leave a question unanswered before it counts as lost; by default Ray ends the trainer after 60."""
ASK_S = 5.0
"""Seconds between two questions."""
CLOSE_S = 60.0
"""Seconds that a private Ray may take to end."""
STOPPED_S = 15.0
"""Seconds that a process of Ray may be stopped (SIGSTOP, as by a debugger) before it counts as lost."""
_POLL_S = 0.25
_DEAD, _STOPPED = ("Z", "X"), "T"
"""States of a process in /proc/PID/stat."""


class WatchedProcesses:
    """Watch the processes that every call to Ray needs.

    Once one is lost, nothing may call Ray any more in this process.
    """

    def __init__(self, pids: dict[int, str], ask: Callable[[], Any] | None = None) -> None:
        """Watch processes of this machine, given as process id -> name.

        `ask`: asks the gcs_server, which may run anywhere, for anything; it too is watched then, until `end`.
        """
        self.is_lost = False
        self._closes_at: float | None = None
        """When the processes began to end because they were told to."""
        self._ended = threading.Event()
        self._answered_at = time.monotonic()
        if ask is not None:
            threading.Thread(target=self._keep_asking, args=(ask,), daemon=True, name="rlqwen-ray-watch").start()
        self._asks = ask is not None
        self._pids = pids
        self._stopped_since: dict[int, float] = {}
        self._helpers = threading.local()

    def check(self) -> None:
        """Raise RolloutError if one of the processes is gone, or has been stopped for `STOPPED_S`."""
        for pid, name in self._pids.items():
            state = _state(pid)
            if state in _DEAD and self._closes_at is None:
                self._lose(f"Ray's {name} (process {pid}) is gone; it may have been killed, or run out of memory")
            if state != _STOPPED:
                self._stopped_since.pop(pid, None)
            elif time.monotonic() - self._stopped_since.setdefault(pid, time.monotonic()) > STOPPED_S:
                self._lose(f"Ray's {name} (process {pid}) has been stopped by a signal for {STOPPED_S:g} s")
        if self._closes_at is not None and time.monotonic() - self._closes_at > CLOSE_S:
            self._lose(f"Ray did not end within {CLOSE_S:g} s")
        if self._asks and time.monotonic() - self._answered_at > SILENT_S + ASK_S:
            self._lose(f"the Ray cluster's gcs_server has not answered for {SILENT_S:g} s")

    def close(self, shutdown: Callable[[], Any]) -> None:
        """Call `shutdown`, which ends the processes; raise RolloutError if one was lost before, or if it takes too long."""
        self.check()
        self._closes_at = time.monotonic()
        self.call(shutdown)

    def end(self) -> None:
        """Ask no more."""
        self._asks = False
        self._ended.set()

    def _keep_asking(self, ask: Callable[[], Any]) -> None:
        while not self._ended.wait(ASK_S):
            # A server that is gone raises an error, or leaves the question open.
            with contextlib.suppress(Exception):
                ask()
                self._answered_at = time.monotonic()

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
            leave_without_destructors()
        raise RolloutError(f"{what}; without it no rollout worker can be reached")


def leave_without_destructors() -> None:
    """Have this process, once Python has ended, skip the destructors of C++ objects, and keep its exit code.

    Ray's threads go on to use objects of theirs that the destructors free, so that the process often crashed there.
    Nothing happens where the C library has no `on_exit`, as outside glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        # They run in reverse, before all that was registered earlier. `_exit` gets the exit code as its first argument.
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


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
