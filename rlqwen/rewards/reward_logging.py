"""What a reward logs beside its rewards: TRL's `log_metric` and `log_extra`, which a reward takes as arguments."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

LOGGERS = ("log_metric", "log_extra")


class Journal:
    """Collects what one call on `count` samples logs; plain values only, because they leave the worker process."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}
        """Column -> a value for each sample."""

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number; the mean over calls is reported with the run's metrics."""
        self.metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a value for each sample, kept with the completions."""
        plain = [_plain(value) for value in values]
        if len(plain) != self._count:
            raise ValueError(f"log_extra({column!r}) was given {len(plain)} values for {self._count} completions")
        self.extras[str(column)] = plain

    def functions(self, names: Iterable[str]) -> dict[str, Callable[..., None]]:
        """Those of LOGGERS that `names` asks for."""
        return {name: getattr(self, name) for name in names}


def _plain(value: Any) -> Any:
    return value if type(value) in (str, int, float, bool, type(None)) else repr(value)
