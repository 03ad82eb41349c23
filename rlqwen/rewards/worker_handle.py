"""Start, talk to and end one reward worker, from the trainer's process."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from rlqwen.rewards.worker_main import TRACE_SIGNAL

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[4:]; from rlqwen.rewards.worker_main import main; main(*map(int, sys.argv[1:4]))"
_STDERR_FD = 2
_TRACE_WAIT = 0.3
_REAP_WAIT = 2.0
_MESSAGE_WAIT_S = 10
_MAX_REPLY_BYTES = 1 << 28


class RewardWorker:
    """Control a worker process, which has its own process group so that programs that its rewards start end with it.

    Not started by multiprocessing, because that would import the user's `__main__` again, which in most training scripts
    starts the training.

    Args:
        setup: a pickled rlqwen.rewards.worker_main.Setup.
        environment: all environment variables of the worker.
        is_silent: discard what the worker prints, so that it inherits no file descriptor of the trainer.
    """

    def __init__(self, setup: bytes, environment: Mapping[str, str], *, is_silent: bool = False) -> None:
        ours, theirs = socket.socketpair()
        self._trace = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        fds = (theirs.fileno(), self._trace.fileno())
        # A reward's prints must not mix with the trainer's own output on stdout.
        sink = _STDERR_FD if _is_open(_STDERR_FD) and not is_silent else subprocess.DEVNULL
        arguments = [sys.executable, "-c", _BOOTSTRAP, *map(str, (*fds, os.getpid())), *map(str, sys.path)]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            pass_fds=fds,
            start_new_session=True,
            env=dict(environment),
        )
        theirs.close()
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            # A worker that stops in the middle of a message must not block the trainer.
            ours.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", _MESSAGE_WAIT_S, 0))
        self.connection = Connection(ours.detach())
        self.pid: int | None = None
        """Process id of the process that calls the rewards; None until it is ready."""
        self.send(setup)

    def send(self, message: bytes) -> None:
        """Send a message. If the worker has died, the reader of `connection` notices it."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(message)

    def receive(self) -> tuple[str, Any] | None:
        """Return the next message as (kind, content); None if the worker has died or sent something malformed."""
        try:
            kind, content = json.loads(self.connection.recv_bytes(_MAX_REPLY_BYTES))
            if kind == "ready":
                self.pid = int(content)
        except (EOFError, OSError, ValueError, TypeError, RecursionError):
            return None
        return kind, content

    def stack(self) -> str:
        """Return the stack of the call in progress, which the worker writes itself; empty if it cannot."""
        if self.pid is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, TRACE_SIGNAL)
        until = time.monotonic() + _TRACE_WAIT
        size = 0
        while time.monotonic() < until:
            time.sleep(0.01)
            written = os.fstat(self._trace.fileno()).st_size
            if written and written == size:
                break
            size = written
        return self.trace_tail()

    def trace_tail(self) -> str:
        """Return what the worker's fault handler wrote, such as the stack at a segmentation fault."""
        return os.pread(self._trace.fileno(), 1 << 16, 0).decode(errors="replace").strip()

    def describe_exit(self) -> str:
        """Say how the process ended; for a worker whose connection has closed."""
        until = time.monotonic() + _REAP_WAIT
        while time.monotonic() < until:
            # Do not reap the process here: its process group id must stay reserved until `kill`.
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                break
            time.sleep(0.005)
        else:
            return "closed its connection"
        code = ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
        if code > 128:
            with contextlib.suppress(ValueError):
                return f"was killed by signal {signal.Signals(code - 128).name}"
        return f"ended itself with exit code {code}"

    def retire(self) -> None:
        """Let an idle worker exit by itself, so that exit handlers of rewards run; call `kill` afterwards."""
        with contextlib.suppress(OSError):
            self.connection.close()

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """End the whole process group and free its resources. May be called once only."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_REAP_WAIT)
        self.retire()
        self._trace.close()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
