"""Control the process that runs a completion's code (rlqwen_rewards.candidate_script)."""

import builtins
import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlqwen_rewards import candidate_script
from rlqwen_rewards.candidate_script import decode, encode

MAX_BYTES = 1 << 22
"""Maximum size of a reply, and of a program's output."""

_START_WAIT = 20.0
_SCRIPT = str(Path(candidate_script.__file__))


@dataclass(frozen=True)
class Limits:
    """Limit one process."""

    timeout: float
    """Seconds per test."""
    memory_bytes: int
    cpu_seconds: int
    """Processor time over all tests."""


class CandidateEnded(BaseException):
    """Report that the code ended its process or ran out of time. A BaseException, so that few tests catch it."""


class Candidate:
    """Run a completion's code in a process that the command `python` starts; a context manager.

    It must not be used again after CandidateEnded. Raises RuntimeError if the interpreter does not start, which is not
    the code's fault.
    """

    def __init__(self, python: Sequence[str], limits: Limits, *, is_program: bool) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        stream = subprocess.PIPE if is_program else subprocess.DEVNULL
        fds = (theirs_in, theirs_out)
        arguments = [*map(str, fds), str(limits.memory_bytes), str(limits.cpu_seconds)]
        try:
            self._process = subprocess.Popen(
                [*python, _SCRIPT, *arguments], stdin=stream, stdout=stream, stderr=subprocess.DEVNULL, pass_fds=fds
            )
        finally:
            for fd in fds:
                os.close(fd)
        self._requests, self._replies = ours_out, ours_in
        for fd in (ours_out, ours_in):
            os.set_blocking(fd, False)
        self._buffer = bytearray()
        self._limits = limits
        self.has_ended = False
        """Whether CandidateEnded was raised, even if a test caught it."""
        self.begin(_START_WAIT)
        try:
            self._receive()
        except CandidateEnded as end:
            self.close()
            raise RuntimeError(f"the interpreter for the code did not start: {end}") from None

    def begin(self, seconds: float | None = None) -> None:
        """Start the time limit of a test."""
        self._until = time.monotonic() + (self._limits.timeout if seconds is None else seconds)

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer as plain data and Remotes. Raises what the code raised, or CandidateEnded."""
        self._send(json.dumps(request).encode() + b"\n")
        try:
            kind, *content = self._receive()
            if kind == "value":
                return decode(content[0], lambda number: Remote(self, int(number)))
            name, message = content
        except (ValueError, TypeError, RecursionError, IndexError) as error:
            raise self._end(f"it sent a malformed answer: {error}") from None
        cls = getattr(builtins, str(name), Exception)
        raise (cls if isinstance(cls, type) and issubclass(cls, Exception) else Exception)(str(message))

    def run_program(self, code: str, standard_input: str) -> str:
        """Return what the program prints for an input. Raises CandidateEnded unless it ends by itself with status 0."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._send(json.dumps(["program", code]).encode() + b"\n")
        self.begin()
        printed = self._exchange(standard_input.encode("utf-8", "surrogatepass"))
        try:
            status = self._process.wait(timeout=max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self._end("out of time") from None
        if status:
            raise self._end(f"exit status {status}")
        return printed.decode("utf-8", "replace")

    def close(self) -> None:
        """End the process; idempotent."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for fd in (self._requests, self._replies):
            if fd >= 0:
                os.close(fd)
        self._requests = self._replies = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, reason: str) -> CandidateEnded:
        self.has_ended = True
        return CandidateEnded(reason)

    def _send(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            self._wait(self._requests, selectors.EVENT_WRITE)
            try:
                view = view[os.write(self._requests, view) :]
            except OSError:
                raise self._end("its process ended") from None

    def _receive(self) -> Any:
        while b"\n" not in self._buffer:
            self._wait(self._replies, selectors.EVENT_READ)
            piece = os.read(self._replies, 1 << 16)
            if not piece or len(self._buffer) + len(piece) > MAX_BYTES:
                raise self._end("its process ended" if not piece else "it returned too much")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _wait(self, fd: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            if not selector.select(max(0.0, self._until - time.monotonic())):
                raise self._end("out of time")

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
                    raise self._end("out of time")
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
                        raise self._end("it printed too much")


class Remote:
    """Stand for an object in the code's process that is not plain data.

    Attributes are read and set, and calls are made, in that process. It equals only itself, even if the code's class
    defines `__eq__`.
    """

    __slots__ = ("_candidate", "_handle")

    def __init__(self, candidate: Candidate, handle: int) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._candidate.ask("call", self._handle, _plain(arguments), _plain(keywords))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.ask("get", self._handle, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.ask("set", self._handle, name, _plain(value))


def _plain(value: Any) -> Any:
    return encode(value, _encode_remote)


def _encode_remote(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"handle": value._handle}
    raise TypeError(f"a test cannot pass {type(value).__name__} objects to the code, only plain data")
