"""Remember the signals that ask this process to stop, whoever handles them.

A signal often comes twice within milliseconds: from a terminal and from a launcher that passes it on, or from a finger.
The second one must not interrupt the clean-up that the first one began.
"""

import time

ECHO_S = 0.5
"""Seconds within which another signal of the same number is an echo of the last."""

_last_came: dict[int, float] = {}


def is_echo(number: int) -> bool:
    """Note that the signal came; return whether it only repeats one that came just before."""
    now = time.monotonic()
    is_repeated = now - _last_came.get(number, float("-inf")) < ECHO_S
    _last_came[number] = now
    return is_repeated


def came() -> set[int]:
    """Return the numbers of the signals that came since `forget`."""
    return set(_last_came)


def forget() -> None:
    """Forget what came, at the start of a command."""
    _last_came.clear()
