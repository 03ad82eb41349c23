"""Stop a run on a signal: save after the update in progress, and leave.

SIGTERM and SIGUSR1 come from schedulers ahead of the end, SIGINT from Ctrl-C or a notebook's stop button, SIGHUP from a
terminal that was closed.
"""

import contextlib
import os
import signal
import stat
import sys
import threading
from types import FrameType
from typing import Any, Self

from rlqwen import stop_signals
from rlqwen.errors import Interrupted, Preempted
from rlqwen.terminal import echo

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Preemption:
    """Request to stop: remembers the first signal; a second one ends the process but runs every `finally`,
    unless it comes so soon that it is an echo of the first.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the first signal that came; None before that."""
        self.worth_saving = False
        """Whether updates were made that no checkpoint holds. Without any, Ctrl-C leaves at once."""
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals, also from a library that has taken them since; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            current = signal.getsignal(number)
            if current != self._receive and current is not signal.SIG_IGN:
                self._before.setdefault(number, current)
                signal.signal(number, self._receive)

    def __enter__(self) -> Self:
        if self.name == "SIGINT":  # Ctrl-C ended what came before, such as an evaluation
            self.name = None
        if self.name is None:
            stop_signals.forget()
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self.name, self.worth_saving = None, False

    def ended(self, what: str) -> Preempted:
        """Return the error to end training with: a KeyboardInterrupt if it was Ctrl-C."""
        name = "Ctrl-C" if self.name == "SIGINT" else self.name or "stopped"
        return (Interrupted if self.name == "SIGINT" else Preempted)(f"{name}: {what}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        if stop_signals.is_echo(number):
            return
        if self.name is not None:
            if self.name == "SIGHUP" == signal.Signals(number).name:
                return  # shell and kernel each send one when a terminal is closed
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            if not self.worth_saving:
                raise KeyboardInterrupt
            _tell("rlqwen: Ctrl-C: saving after this update; press it again to leave at once")


def _leave_terminal() -> None:
    """Send later output to /dev/null, because a write to a terminal that is gone is an error."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _tell(text: str) -> None:
    # The signal may have come in the middle of another print, which Python lets no handler join.
    with contextlib.suppress(RuntimeError, OSError):
        echo(text, err=True)
