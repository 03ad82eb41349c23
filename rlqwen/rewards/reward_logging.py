"""Collect what a reward logs: TRL's `log_metric` and `log_extra`, which a reward takes as arguments."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

LOGGERS = ("log_metric", "log_extra")


class RewardLogger:
    """Collect what one call on `count` samples logs, as JSON values, because they leave the worker process."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}
        """Column -> one value per sample."""

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number. The run's metrics report the mean over calls."""
        self.metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log one value per sample. They are written with the completions."""
        plain = [_plain(value) for value in values]
        if len(plain) != self._count:
            raise ValueError(f"log_extra({column!r}) was given {len(plain)} values for {self._count} completions")
        self.extras[str(column)] = plain

    def functions(self, names: Iterable[str]) -> dict[str, Callable[..., None]]:
        """Return the log functions with these `names`, which are among LOGGERS."""
        return {name: getattr(self, name) for name in names}


def _plain(value: Any) -> Any:
    return value if type(value) in (str, int, float, bool, type(None)) else repr(value)
