"""SIGTERM and SIGUSR1, with which schedulers announce the end: save after the update in progress, and leave."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; a second one ends the process by way of every `finally`."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the signal that came; None as long as none did."""
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over, again where a library has taken them since; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            current = signal.getsignal(number)
            if current != self._receive:
                self._before.setdefault(number, current)
                signal.signal(number, self._receive)

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            sys.exit(128 + number)
        self.name = signal.Signals(number).name
