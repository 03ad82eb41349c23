"""Collect what a reward logs: TRL's `log_metric` and `log_extra`, which a reward takes as arguments."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

LOGGERS = ("log_metric", "log_extra")

MAX_NAME_LENGTH = 200
"""Maximum number of characters in the name of a metric or column."""


class RewardLogger:
    """Collect what one call on `count` samples logs, as JSON values, because they leave the worker process."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}
        """Column -> one value per sample."""

    def log_metric(self, name: str, value: Any) -> None:
        """Log a finite number. The run's metrics report the mean over calls."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r:.80}) was given {number}, which is not a finite number")
        self.metrics.append((_short(name, "log_metric"), number))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log one value per sample, which are written with the completions; a number that is not finite as null."""
        plain = [_plain(value) for value in values]
        if len(plain) != self._count:
            raise ValueError(f"log_extra({column!r}) was given {len(plain)} values for {self._count} completions")
        self.extras[_short(column, "log_extra")] = plain

    def functions(self, names: Iterable[str]) -> dict[str, Callable[..., None]]:
        """Return the log functions with these `names`, which are among LOGGERS."""
        return {name: getattr(self, name) for name in names}


def _short(name: Any, function: str) -> str:
    text = str(name)
    if len(text) > MAX_NAME_LENGTH:
        raise ValueError(f"{function} was given a name of {len(text)} characters, and takes {MAX_NAME_LENGTH}")
    return text


def _plain(value: Any) -> Any:
    if type(value) is float and not math.isfinite(value):
        return None
    if type(value) is int and value.bit_length() > 63:
        return repr(value) if value.bit_length() < 10_000 else f"an integer of {value.bit_length()} bits"
    return value if type(value) in (str, int, float, bool, type(None)) else repr(value)
