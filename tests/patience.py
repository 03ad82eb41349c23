"""How tests wait: for an event, never by the clock. The deadline is generous, as it only ends a test that hangs."""

import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""Far above what anything that a test waits for takes, on a slow machine beside other work too."""


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Wait until `happened()` is true; `what` says in the failure what did not happen."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"after {PATIENCE_S:.0f} s not yet: {what}"
        time.sleep(0.02)
