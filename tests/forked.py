"""Runs a function in a child process of its own that may be killed, without importing everything again."""

import os
import time
import traceback
from collections.abc import Callable

import torch

from tests.patience import PATIENCE_S


def run_forked(
    function: Callable[[], object], *, kill_after_s: float | None = None, deadline_s: float = PATIENCE_S
) -> int:
    """Call `function` in a forked child, killed after `kill_after_s`; returns its exit code, the negative number of the
    signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
            function()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    started = time.monotonic()
    until = started + deadline_s
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill_after_s is not None and time.monotonic() > started + kill_after_s:
            os.kill(pid, 9)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child was not done after {deadline_s} s")
