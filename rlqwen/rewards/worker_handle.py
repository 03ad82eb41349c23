"""Start, talk to and end one reward worker, from the trainer's process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from rlqwen.rewards.worker_main import TRACE_SIGNAL
from rlqwen.rewards.worker_messages import HEADER, Message, WorkerMessages, clean

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[4:]; from rlqwen.rewards.worker_main import main; main(*map(int, sys.argv[1:4]))"
_STDERR_FD = 2
_TRACE_WAIT = 0.3
_REAP_WAIT = 2.0
_CHUNK_BYTES = 1 << 16
_MAX_TRACE_FILE = 1 << 16
MAX_CALL_BYTES = (1 << 31) - 1
"""Maximum size of a message to a worker."""


class RewardWorker:
    """Control a worker process, which has its own process group so that programs that its rewards start end with it.

    Not started by multiprocessing, because that would import the user's `__main__` again, which in most training scripts
    starts the training.

    Args:
        setup: a pickled rlqwen.rewards.worker_main.Setup.
        num_rewards: how many rewards the setup has.
        environment: all environment variables of the worker.
        is_silent: discard what the worker prints, so that it inherits no file descriptor of the trainer.
    """

    def __init__(
        self, setup: bytes, num_rewards: int, environment: Mapping[str, str], *, is_silent: bool = False
    ) -> None:
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
        ours.setblocking(False)
        self.connection = ours
        self.messages = WorkerMessages(num_rewards)
        self._outgoing = bytearray()
        # Names this very process, whoever reaps it: what the worker says about itself is not believed.
        self._pidfd = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else None
        self.send(setup)

    @property
    def has_more_to_send(self) -> bool:
        return bool(self._outgoing)

    def send(self, message: bytes) -> None:
        """Send as much of a message as the worker takes now; `flush` sends the rest.

        If the worker has died, the reader of `connection` notices it.
        """
        self._outgoing += HEADER.pack(len(message))
        self._outgoing += message
        self.flush()

    def flush(self) -> None:
        """Send more of the messages, without waiting for the worker to read."""
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as view:
                    sent = self.connection.send(view)
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()

    def receive(self) -> list[Message]:
        """Return the messages that are complete, without waiting for more.

        Raises EOFError if the worker has died, WorkerMisbehaved if it sent what it may not.
        """
        try:
            data = self.connection.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        return self.messages.feed(data)

    def stack(self) -> str:
        """Return the stack of the call in progress, which the worker writes itself; empty if it cannot."""
        self._signal(TRACE_SIGNAL)  # the watchdog passes it on
        until = time.monotonic() + _TRACE_WAIT
        size = 0
        while time.monotonic() < until:
            time.sleep(0.01)
            written = os.fstat(self._trace.fileno()).st_size
            if written and written == size:
                break
            size = written
        return self.trace_tail()

    def _signal(self, number: int) -> bool:
        """Signal the watchdog; return whether it is still there, if only to be reaped."""
        try:
            if self._pidfd is None:
                os.kill(self._process.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)
        except OSError:
            return False
        return True

    def trace_tail(self) -> str:
        """Return what the worker's fault handler wrote, such as the stack at a segmentation fault."""
        written = os.pread(self._trace.fileno(), _MAX_TRACE_FILE, 0).decode(errors="replace")
        return clean(written, _MAX_TRACE_FILE).strip()

    def describe_exit(self) -> str:
        """Say how the process ended; for a worker whose connection has closed."""
        until = time.monotonic() + _REAP_WAIT
        while time.monotonic() < until:
            ended = self._exit()
            if ended is not None:
                kind, status = ended
                return (
                    f"ended itself with exit code {status}"
                    if kind == os.CLD_EXITED
                    else f"was killed by {_name(status)}"
                )
            time.sleep(0.005)
        return "closed its connection"

    def retire(self) -> None:
        """Let an idle worker exit by itself, so that exit handlers of rewards run; call `kill` afterwards."""
        with contextlib.suppress(OSError):
            self.connection.close()

    def ran_out_of_processor_time(self) -> bool:
        ended = self._exit()
        return ended is not None and ended[0] != os.CLD_EXITED and ended[1] == signal.SIGXCPU

    def has_ended(self) -> bool:
        return self._exit() is not None

    def _exit(self) -> tuple[int, int] | None:
        """Return how the watchdog ended, which ends as the worker does, as (si_code, si_status); None while it runs.

        Does not reap it: the id of its process group must stay reserved until `kill`.
        """
        try:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return os.CLD_EXITED, -1  # something else in this process has waited for all children
        return None if ended is None else (ended.si_code, ended.si_status)

    def kill(self) -> None:
        """End the whole process group and free its resources. May be called once only."""
        if self._signal(0):  # otherwise the id of the group may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_REAP_WAIT)
        self.retire()
        self._trace.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
