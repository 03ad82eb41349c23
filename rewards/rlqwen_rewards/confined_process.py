"""Start the processes that run a completion's code and a dataset's tests (rlqwen_rewards.confined), and end them in time.

Nothing that they write is decoded here: a report is one byte, and what a program prints is text.
"""

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlqwen_rewards import confined
from rlqwen_rewards.confined.candidate import READY
from rlqwen_rewards.confined.judge import LOADED, MAX_BYTES, PASSED

_START_WAIT = 20.0
_PROGRAM = str(Path(confined.__file__).parent)


@dataclass(frozen=True)
class Limits:
    """Limit one process."""

    timeout: float
    """Seconds per test."""
    memory_bytes: int
    cpu_seconds: int
    """Processor time over all tests."""


class Ended(Exception):
    """Report that a process ended or ran out of time."""


class _Processes:
    """Hold confined processes and this end of the pipes to them; a context manager that ends them.

    Raises RuntimeError if the interpreter does not start, which is nobody's code's fault.
    """

    def __init__(self, python: Sequence[str], limits: Limits) -> None:
        self._command = [*python, _PROGRAM]
        self._limits = limits
        self._processes: list[subprocess.Popen[bytes]] = []
        self._to, self._from = -1, -1
        self._until = 0.0

    def _start(self, role: str, fds: Sequence[int], stream: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        arguments = [role, str(self._limits.memory_bytes), str(self._limits.cpu_seconds), *map(str, fds)]
        command = [*self._command, *arguments]
        process = subprocess.Popen(command, stdin=stream, stdout=stream, stderr=subprocess.DEVNULL, pass_fds=fds)
        self._processes.append(process)
        return process

    def _await_ready(self) -> None:
        self.begin(_START_WAIT)
        try:
            if self._read(len(READY)) != READY:
                raise Ended("it sent something else")
        except Ended as end:
            raise RuntimeError(f"the interpreter for the code did not start: {end}") from None

    def begin(self, seconds: float | None = None) -> None:
        """Start the time limit of a test."""
        self._until = time.monotonic() + (self._limits.timeout if seconds is None else seconds)

    def _send(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            self._wait(self._to, selectors.EVENT_WRITE)
            try:
                view = view[os.write(self._to, view) :]
            except OSError:
                raise Ended("its process ended") from None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._wait(self._from, selectors.EVENT_READ)
            piece = os.read(self._from, size - len(data))
            if not piece:
                raise Ended("its process ended")
            data += piece
        return data

    def _wait(self, fd: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            if not selector.select(max(0.0, self._until - time.monotonic())):
                raise Ended("out of time")

    def close(self) -> None:
        """End the processes; idempotent."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        for fd in (self._to, self._from):
            if fd >= 0:
                os.close(fd)
        self._to = self._from = -1

    @contextlib.contextmanager
    def _starting(self) -> Iterator[list[int]]:
        """Wait for the processes that are started inside; end them, and close their descriptors, if that fails.

        Yields a list for the descriptors of all pipes; those that are not this process's own are closed here.
        """
        opened: list[int] = []
        try:
            try:
                yield opened
            finally:
                for fd in opened:
                    if fd not in (self._to, self._from):
                        os.close(fd)
            for fd in (self._to, self._from):
                os.set_blocking(fd, False)
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Trial(_Processes):
    """Run tests in one process on the code in another.

    Args:
        python: the command that starts an interpreter.
        limits: of each of the two processes.
        job: what rlqwen_rewards.confined.judge reads.
    """

    def __init__(self, python: Sequence[str], limits: Limits, job: dict[str, Any]) -> None:
        super().__init__(python, limits)
        with self._starting() as opened:
            requests_read, requests_write = _pipe(opened)
            replies_read, replies_write = _pipe(opened)
            jobs_read, self._to = _pipe(opened)
            self._from, reports_write = _pipe(opened)
            self._start("candidate", (requests_read, replies_write))
            self._start("judge", (jobs_read, reports_write, requests_write, replies_read))
        self._job: bytes | None = json.dumps(job).encode() + b"\n"

    def next_passes(self) -> bool:
        """Return whether the next test passes; raise Ended if that and the later ones cannot be known."""
        if self._job is not None:
            job, self._job = self._job, None
            self.begin()
            self._send(job)
            if self._read(1) != LOADED:
                raise Ended("the code does not load")
        self.begin()
        return self._read(1) == PASSED


class ProgramRun(_Processes):
    """Run the code as a program, in a process of its own."""

    def __init__(self, python: Sequence[str], limits: Limits) -> None:
        super().__init__(python, limits)
        with self._starting() as opened:
            requests_read, self._to = _pipe(opened)
            self._from, replies_write = _pipe(opened)
            self._process = self._start("candidate", (requests_read, replies_write), subprocess.PIPE)

    def printed(self, code: str, standard_input: str) -> str:
        """Return what the program prints for an input. Raises Ended unless it ends by itself with status 0."""
        self._send(json.dumps(["program", code]).encode() + b"\n")
        self.begin()
        printed = self._exchange(standard_input.encode("utf-8", "surrogatepass"))
        try:
            status = self._process.wait(timeout=max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Ended("out of time") from None
        if status:
            raise Ended(f"exit status {status}")
        return printed.decode("utf-8", "replace")

    def _exchange(self, text: bytes) -> bytes:
        """Write the program's input while reading its output, until the program closes its output."""
        source, sink = self._process.stdin, self._process.stdout
        assert source is not None
        assert sink is not None
        printed = bytearray()
        rest = memoryview(text)
        with selectors.DefaultSelector() as selector:
            for stream, event in ((source, selectors.EVENT_WRITE), (sink, selectors.EVENT_READ)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, event)
            while True:
                ready = selector.select(max(0.0, self._until - time.monotonic()))
                if not ready:
                    raise Ended("out of time")
                for key, _ in ready:
                    if key.fileobj is source:
                        try:
                            rest = rest[os.write(source.fileno(), rest) :]
                        except OSError:
                            rest = rest[len(rest) :]  # the program has closed its input
                        if not rest:
                            selector.unregister(source)
                            with contextlib.suppress(OSError):
                                source.close()
                        continue
                    piece = os.read(sink.fileno(), 1 << 16)
                    printed += piece
                    if not piece:
                        return bytes(printed)
                    if len(printed) > MAX_BYTES:
                        raise Ended("it printed too much")


def _pipe(ends: list[int]) -> tuple[int, int]:
    """Return a new pipe, whose two ends are added to `ends`."""
    pipe = os.pipe()
    ends += pipe
    return pipe
