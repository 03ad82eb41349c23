"""Show text that strangers wrote without letting it control the terminal, and outlive a terminal or pipe that goes away.

Data, completions, paths, names and errors may hold escape codes, which set a terminal's title, clear it, write to the
clipboard or hide text. `printable` makes them visible. Everything that is shown passes through it: the streams of the
command line (`guarded_streams`), rich's output (`rlqwen.reporting.console`), errors, warnings, log lines and notes.
"""

import codecs
import contextlib
import errno
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Control characters of C0 and C1 other than tab and newline, line separators, overrides and isolates of the text's
# direction, and surrogates. Direction marks and joiners stay, because ordinary Arabic and emoji need them.
UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")
"""Characters that could control a terminal."""
_CURSOR_MOVE = re.compile(r"\n+|(?:\x1b\[A)+")
"""What progress bars of other libraries write to get from one bar to another."""


def printable(text: str) -> str:
    r"""Return `text` with each character that could control a terminal written as `\x1b` or `\u202e`.

    Tabs, newlines and all letters, Chinese and emoji among them, stay as they are.
    """
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> list[str]:
    r"""Return the printable lines of `text`: it ends a line at `\n` and `\r\n` alone, as a terminal shows it.

    `str.splitlines` also ends one at `\x85`, `\u2028` and six others, which `printable` writes as escapes.
    """
    return printable(text).splitlines()


def json_text(value: Any, **options: Any) -> str:
    """Return `value` as JSON that is readable and safe to print, and that reads back as the same value.

    `options`: further arguments of `json.dumps`.
    """
    # Only characters inside strings can be unsafe here, where \u escapes are JSON.
    return UNSAFE.sub(lambda match: rf"\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False, **options))


def echo(text: str, *, err: bool = False) -> None:
    """Print one line to standard output, or to standard error; raises OSError if it cannot be written."""
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)


def warn(text: str, stacklevel: int = 1) -> None:
    """Warn as `warnings.warn` does."""
    warnings.warn(printable(text), stacklevel=stacklevel + 1)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of this name, whose lines are printable."""
    logger = logging.getLogger(name)
    if _make_printable not in logger.filters:
        logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


class TerminalStream:
    """Write to a text stream what is printable, and remember when the stream is lost: full, closed, or a pipe that ended.

    A lost stream is replaced by /dev/null, so that nothing that is still buffered fails again at the end of the process.

    Args:
        stream: standard output or error.
        keeps_going: whether a write to a lost stream is no error.
    """

    def __init__(self, stream: Any, *, keeps_going: bool) -> None:
        self.stream = stream
        self.keeps_going = keeps_going
        self.loss: OSError | None = None
        """Why nothing can be written; None while it can."""
        self.styled = _StyledStream(self)

    def write(self, text: str) -> int:
        """Write `text`; return its number of characters."""
        self.write_styled(text if _CURSOR_MOVE.fullmatch(text) else _printable_line(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all `lines`."""
        for line in lines:
            self.write(line)

    def write_styled(self, text: str) -> None:
        """Write `text` as it is."""
        if text:  # click tries a stream with nothing, and takes an error for an answer
            self._attempt(self.stream.write, text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self.stream.flush)

    def _attempt(self, write: Callable[..., object], *text: str) -> None:
        if self.loss is None:
            try:
                write(*text)
            except OSError as error:
                self._lose(error)
        if self.loss is not None and not self.keeps_going:
            raise self.loss

    def _lose(self, error: OSError) -> None:
        self.loss = error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.keeps_going and self is sys.stdout and error.errno != errno.EPIPE:
            echo(f"rlqwen: standard output cannot be written ({error.strerror}): going on without it", err=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _StyledStream:
    """Write to a TerminalStream what holds escape codes on purpose."""

    def __init__(self, stream: TerminalStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write_styled(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _printable_line(text: str) -> str:
    """Return `text` as printable, but for a return at its very beginning, with which progress bars draw anew."""
    return f"\r{printable(text[1:])}" if text.startswith("\r") else printable(text)


def guarded(stream: Any, *, keeps_going: bool) -> Any:
    """Return standard output or error as a TerminalStream; None, which Python has for a closed one, stays None.

    Characters that the stream's encoding lacks are written as escapes.
    """
    if isinstance(stream, io.TextIOWrapper):
        # In an encoding of ASCII alone, click would write around the TerminalStream.
        is_ascii = codecs.lookup(stream.encoding).name == "ascii"
        stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="backslashreplace")
    return stream if stream is None else TerminalStream(stream, keeps_going=keeps_going)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Replace standard output and error by guarded ones.

    A loss of standard output is an error of its writer until `outlive_output` is called; a loss of standard error never.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = guarded(sys.stdout, keeps_going=False), guarded(sys.stderr, keeps_going=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def outlive_output() -> None:
    """Go on if standard output is lost from here on, without it."""
    if isinstance(sys.stdout, TerminalStream):
        sys.stdout.keeps_going = True


def lost_output() -> OSError | None:
    """Return why standard output was lost; None if it was not."""
    return sys.stdout.loss if isinstance(sys.stdout, TerminalStream) else None


def styled(stream: Any) -> Any:
    """Return a stream for a writer that takes care of escape codes itself, and goes on where `stream` does."""
    stream = getattr(stream, "rich_proxied_file", stream)
    return stream.styled if isinstance(stream, TerminalStream) else stream


def open_standard_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed on /dev/null, so that no file of the run gets their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)
