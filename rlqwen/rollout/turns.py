"""Have one thread sample and another send weights, in turns of the same pool."""

import contextlib
import threading
from collections.abc import Iterator

WAIT_S = 0.05
"""Longest wait of a turn in which another thread may want to send weights."""


class Turns:
    """A lock that whoever sends weights gets next, however often it is taken for sampling."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nothing_to_send = threading.Event()
        self._nothing_to_send.set()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Take a turn of handing out and collecting groups."""
        self._nothing_to_send.wait()
        with self._lock:
            yield

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Take a turn of sending weights."""
        self._nothing_to_send.clear()
        try:
            with self._lock:
                yield
        finally:
            self._nothing_to_send.set()
