"""Do what commands need before and after their own work: read recipes, silence libraries, end cleanly, print."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from rlqwen import stop_signals

TERMINATED = 143
RUN_AGAIN = 75
"""EX_TEMPFAIL: a scheduler may run the command again, with --resume."""
_CAUSE_S = 15.0
"""Seconds for a launcher to see which rank ended first."""


def read_recipes(words: tuple[str, ...]) -> list[Any]:
    """Read recipes and overrides from the words of the command line; print the warnings meanwhile."""
    from rlqwen.config.recipe_yaml import load_recipes

    overrides = [word for word in words if "=" in word and not os.path.isfile(word)]  # noqa: PTH113 - words may be too long for a path
    names = [word for word in words if word not in overrides]
    if not names:
        raise click.UsageError("no recipe given; `rlqwen recipes` lists those that come with rlqwen")
    with warnings.catch_warnings(record=True) as caught:
        recipes = load_recipes(names, overrides)
    for warning in caught:
        click.echo(f"rlqwen: {warning.message}", err=True)
    return recipes


def prepare(*, resumable: bool = False) -> None:
    """Prepare a command that loads models: end cleanly on SIGTERM, and silence warnings that users cannot act on.

    `resumable`: the exit code says that the command may be run again. SIGUSR1, which schedulers send ahead of the end,
    means the same, as does SIGHUP unless nohup ignores it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP) if resumable else (signal.SIGTERM,):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_resumable if resumable else _terminate)
    warnings.formatwarning = _one_line(warnings.formatwarning)
    import torch
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that could be downloaded
    disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other


def _one_line(otherwise: Callable[..., str]) -> Callable[..., str]:
    """Format warnings of rlqwen's own modules without file, line and code, and others with `otherwise`."""
    package = str(Path(__file__).parents[1]) + os.sep

    def format_warning(message: Any, category: type[Warning], filename: str, *rest: Any, **named: Any) -> str:
        if category is UserWarning and filename.startswith(package):
            return f"rlqwen: {message}\n"
        return otherwise(message, category, filename, *rest, **named)

    return format_warning


@contextmanager
def hearing_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, as Python does, but once for one that comes twice, and remember that it came."""
    stop_signals.forget()
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_on_signals(code: int) -> None:
    """Have a further signal end this process at once, with the exit code that is decided already."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None if stop_signals.is_echo(number) else os._exit(code))


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not stop_signals.is_echo(number):
        raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    """End through every `finally`, so that no worker outlives the run."""
    if not stop_signals.is_echo(number):
        sys.exit(TERMINATED)


def _end_resumable(number: int, frame: FrameType | None) -> None:
    """End as `_terminate` does; while a trainer trains, it handles the signals itself and saves first."""
    if not stop_signals.is_echo(number):
        sys.exit(RUN_AGAIN)


def wait_for_cause(error: Exception) -> None:
    """Wait before an error is shown that only says that another rank is gone, so that the other rank's error comes
    first.

    The launcher ends this process meanwhile.
    """
    if "RANK" not in os.environ or "torch" not in sys.modules:
        return
    from rlqwen.distributed import is_loss_of_rank

    if is_loss_of_rank(error):
        time.sleep(_CAUSE_S)


def console() -> Any:
    """Return standard output; wide if it is not a terminal, so that a log or a pipe gets whole lines."""
    from rlqwen.reporting.console import TerminalConsole

    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return TerminalConsole(width=None if is_terminal else 160)
