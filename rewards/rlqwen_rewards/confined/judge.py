"""Run a dataset's tests on the code of a completion, which another process runs.

Tests are code of strangers as the completion is. This process holds the tests and the expected results, asks the other one
for values, decodes and compares them, and reports one byte a test. Whoever started both ends them at their deadline.

It reads one line, `{"code": ..., "entry_point": ..., "helpers": ..., "cases": [...]}`; a case is `["statements", setup,
source]` or `["call", function, arguments, expected]`.
"""

import builtins
import json
import math
import os
from typing import Any, BinaryIO

from rlqwen_rewards.confined.candidate import READY
from rlqwen_rewards.confined.name_sources import TestNames, names_of_code
from rlqwen_rewards.confined.values import decode, encode

LOADED, PASSED, FAILED = b"l", b"+", b"-"
MAX_BYTES = 1 << 22
"""Maximum size of a reply of the code, and of a program's output."""

_RELATIVE_TOLERANCE = 1e-6


class CandidateEnded(BaseException):
    """Report that the code ended its process. A BaseException, so that few tests catch it."""


class Candidate:
    """Ask the process of the code; it must not be used again after CandidateEnded."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies
        self.has_ended = False
        """Whether CandidateEnded was raised, even if a test caught it."""

    def ask(self, *request: Any) -> Any:
        """Send a request and return the answer as plain data and Remotes. Raises what the code raised, or CandidateEnded."""
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            line = self._replies.readline(MAX_BYTES + 1)
        except OSError:
            raise self._end("its process ended") from None
        if not line.endswith(b"\n"):
            raise self._end("it returned too much" if len(line) > MAX_BYTES else "its process ended")
        try:
            kind, *content = json.loads(line)
            if kind == "value":
                return decode(content[0], lambda number: Remote(self, int(number)))
            name, message = content
        except (ValueError, TypeError, RecursionError, IndexError) as error:
            raise self._end(f"it sent a malformed answer: {error}") from None
        cls = getattr(builtins, str(name), Exception)
        raise (cls if isinstance(cls, type) and issubclass(cls, Exception) else Exception)(str(message))

    def name(self, name: str) -> Any:
        """Return what the code calls `name`; raises AttributeError if it has none."""
        return self.ask("get", 0, name)

    def _end(self, reason: str) -> CandidateEnded:
        self.has_ended = True
        return CandidateEnded(reason)


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


def main(jobs_fd: int, reports_fd: int, requests_fd: int, replies_fd: int) -> None:
    """Load the code, run the tests, and report on each; end at the first after which the code's process has ended."""
    reports = os.fdopen(reports_fd, "wb", buffering=0)
    candidate = Candidate(os.fdopen(requests_fd, "wb", buffering=0), os.fdopen(replies_fd, "rb"))
    if candidate._replies.readline(len(READY)) != READY:
        return
    reports.write(READY)
    with os.fdopen(jobs_fd, "rb") as jobs:
        job = json.loads(jobs.readline())
    try:
        candidate.ask("load", job["code"])
    except (Exception, CandidateEnded):  # noqa: BLE001  the code may raise anything
        return
    reports.write(LOADED)
    taken = names_of_code(
        [f"{case[1]}\n{case[2]}" for case in job["cases"] if case[0] == "statements"], job["entry_point"]
    )
    for case in job["cases"]:
        names = TestNames(candidate.name, taken, job["helpers"], job["entry_point"])
        try:
            passes = _passes(case, candidate, names) and not candidate.has_ended
        except (Exception, CandidateEnded):  # noqa: BLE001  a test may raise anything
            passes = False
        reports.write(PASSED if passes else FAILED)
        if candidate.has_ended:
            return


def _passes(case: list[Any], candidate: Candidate, names: TestNames) -> bool:
    kind, *content = case
    if kind == "statements":
        setup, source = content
        exec(compile(setup, "<setup>", "exec"), names, names)  # noqa: S102
        exec(compile(source, "<test>", "exec"), names, names)  # noqa: S102
        return True
    name, arguments, expected = content
    try:
        function = candidate.name(name)
    except AttributeError:
        function = getattr(candidate.name("Solution")(), name)
    return same_value(function(*decode(arguments, _no_handle)), decode(expected, _no_handle))


def _no_handle(number: int) -> Any:
    raise ValueError(f"a test has no object {number} of the code")


def same_value(value: Any, expected: Any) -> bool:
    """Compare plain data as JSON would: tuples equal lists, and floats may differ in the last digits."""
    if isinstance(value, Remote):
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        given, wanted = ({str(key): one for key, one in content.items()} for content in (value, expected))
        return given.keys() == wanted.keys() and all(same_value(given[key], wanted[key]) for key in given)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(value, expected, rel_tol=_RELATIVE_TOLERANCE)
    return type(value) is type(expected) and bool(value == expected)
