"""Call rewards in a worker process. Started by rlqwen.rewards.worker_handle; imports no torch unless a reward does.

A worker is two processes. The first one becomes a watchdog: it runs no user code, so nothing can stop it from ending
the whole process group, including programs that a reward started, when the trainer is gone. Its child calls the
rewards, in the main thread, because math-verify's timeouts are signal alarms.

Messages to a worker: first a Setup, then (number of the call, index of the reward, number of samples, names of arguments
that the worker adds, pickled arguments). rlqwen.rewards.worker_messages describes those from a worker.
"""

import contextlib
import faulthandler
import io
import math
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from rlqwen.rewards.reward_call import MAX_TRACE_LENGTH, call, describe
from rlqwen.rewards.reward_logging import LOGGERS
from rlqwen.rewards.sandbox import signals
from rlqwen.rewards.worker_messages import clean, message, reply
from rlqwen.terminal import guarded

TRACE_SIGNAL = signal.SIGUSR1
"""Makes a worker write its stack to its trace file, even from inside C code that holds the interpreter lock."""

CONFINED_PYTHON = "confined_python"
"""Argument of isolated rewards that take it: the start of a command line that runs a Python script confined."""

MAX_PROCESSES = 32
"""Maximum number of processes of one isolated worker."""

_WATCHDOG_PERIOD = 0.2
_WATCHDOG_PERIOD_ISOLATED = 0.05
_PR_SET_PDEATHSIG = 1
_MAX_FILE_BYTES = 1 << 20


@dataclass(slots=True, frozen=True)
class Setup:
    """Hold what a worker needs before it can call rewards."""

    functions: tuple[bytes, ...]
    """The rewards, pickled."""
    memory_bytes: int | None
    """Memory limit of the process. If isolated, also the limit of its process group together."""
    cpu_seconds: float | None
    """Limit of processor time per call, summed over all threads of the process."""
    isolate: bool
    """Whether to run in the sandbox (rlqwen.rewards.sandbox.sandbox)."""


def main(connection_fd: int, trace_fd: int, trainer_pid: int) -> None:
    """Call rewards until the trainer closes its end of the connection or is gone."""
    del sys.argv[1:]  # modules that a reward imports may read them
    for fd in (connection_fd, trace_fd):
        os.set_inheritable(fd, False)
    # A terminal sends these signals to the trainer too, which then saves. A handler rather than SIG_IGN, because
    # programs that a reward starts would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    connection = Connection(connection_fd)
    setup: Setup = pickle.loads(connection.recv_bytes())
    signal.signal(TRACE_SIGNAL, signal.SIG_IGN)
    # Carries the held signals of an isolated worker to the watchdog, on kernels that need that.
    channel = socket.socketpair() if setup.isolate and signals.must_be_held() else None
    watchdog_pid = os.getpid()
    worker_pid = os.fork()
    if worker_pid:
        connection.close()
        _Watchdog(worker_pid, trainer_pid, trace_fd, setup).watch(channel)
    _die_with(watchdog_pid)
    faulthandler.enable(file=trace_fd)
    faulthandler.register(TRACE_SIGNAL, file=trace_fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if the trainer's is closed
            stream.reconfigure(line_buffering=True)
    # A reward may print completions, and must not fail when the trainer's terminal is gone.
    sys.stdout, sys.stderr = (guarded(stream, keeps_going=True) for stream in (sys.stdout, sys.stderr))
    _serve(connection, setup, trainer_pid, channel)


class _Watchdog:
    """Wait for the worker to end, and end as it did.

    End the process group if the trainer ends first, or if the processes of an isolated worker exceed their limits. The
    worker can neither stop nor mislead it: nothing that the watchdog waits for is the worker's to write or close.
    """

    def __init__(self, worker_pid: int, trainer_pid: int, trace_fd: int, setup: Setup) -> None:
        self._worker_pid, self._trainer_pid, self._trace_fd, self._setup = worker_pid, trainer_pid, trace_fd, setup
        # Without pidfds, which only Linux has, the end of the worker is noticed at the next look.
        self._ended: list[int] = [os.pidfd_open(worker_pid)] if hasattr(os, "pidfd_open") else []
        signal.signal(TRACE_SIGNAL, lambda *_: os.kill(worker_pid, TRACE_SIGNAL))

    def watch(self, channel: tuple[socket.socket, socket.socket] | None) -> NoReturn:
        held = [] if channel is None else self._receive_held(*channel)
        period = _WATCHDOG_PERIOD_ISOLATED if self._setup.isolate else _WATCHDOG_PERIOD
        look_at = time.monotonic()
        while os.getppid() == self._trainer_pid:
            ready, _, _ = select.select([*self._ended, *held], [], [], max(0.0, look_at - time.monotonic()))
            if os.waitid(os.P_PID, self._worker_pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._end_like_worker()
            for listener in held:
                if listener in ready:
                    signals.answer(listener)
            if time.monotonic() < look_at:
                continue
            look_at = time.monotonic() + period
            excess = _excess(self._setup.memory_bytes or math.inf) if self._setup.isolate else None
            if excess:
                os.write(self._trace_fd, f"{excess}\n".encode())
                break
        os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def _receive_held(self, ours: socket.socket, theirs: socket.socket) -> list[int]:
        """Return the file descriptor of held signals, for which no code of a reward has run yet; [] if there is none."""
        theirs.close()
        with ours:
            return socket.recv_fds(ours, 1, 1)[1]

    def _end_like_worker(self) -> NoReturn:
        signal.signal(TRACE_SIGNAL, signal.SIG_IGN)  # from here on the worker's process id may be another process's
        _, status = os.waitpid(self._worker_pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):  # SIGKILL has no handler
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code if code >= 0 else 128 - code)


def _excess(max_bytes: float) -> str | None:
    """Say which limit the processes of this group exceed; None if none."""
    group, watchdog, num_bytes, count = os.getpgrp(), os.getpid(), 0, 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == watchdog:
            continue
        with contextlib.suppress(OSError):
            # The program's name, which may contain any character, is in parentheses before the other fields.
            if int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[2]) != group:
                continue
            _, resident, shared, *_ = map(int, (folder / "statm").read_text().split())
            count += 1
            num_bytes += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
        if count > MAX_PROCESSES:
            return f"an isolated reward may have {MAX_PROCESSES} processes, and had more"
    if num_bytes > max_bytes:
        return f"the processes of an isolated reward took {num_bytes / 2**30:.1f} GiB together"
    return None


def _die_with(watchdog_pid: int) -> None:
    """Ask the kernel to kill this process when the watchdog ends for any reason (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != watchdog_pid:
        os._exit(1)


def _serve(
    connection: Connection, setup: Setup, trainer_pid: int, channel: tuple[socket.socket, socket.socket] | None
) -> None:
    _limit_resources(setup)
    if setup.isolate:
        from rlqwen.rewards.sandbox.sandbox import isolate

        try:
            isolate(trainer_pid, partial(_hand_over, channel))
        except OSError as error:
            connection.send_bytes(message("unsafe", clean(str(error), MAX_TRACE_LENGTH)))
            return
    if channel is not None:
        for end in channel:
            end.close()
    connection.send_bytes(message("started"))
    functions = []
    for index, function in enumerate(setup.functions):
        try:
            functions.append(pickle.loads(function))
        except BaseException as error:  # noqa: BLE001  user code is imported here
            trace = clean(describe(error, frames_to_hide=1), MAX_TRACE_LENGTH)
            connection.send_bytes(message("unloadable", index, trace))
            return
    connection.send_bytes(message("ready"))
    while True:
        try:
            number, index, count, names, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        _limit_processor_time(setup.cpu_seconds)
        arguments = partial(_arguments, arguments, names, setup.isolate)
        result = call(functions[index], arguments, count, loggers=[name for name in names if name in LOGGERS])
        if sys.stdout is not None:
            sys.stdout.flush()
        connection.send_bytes(reply(number, result, names))


def _hand_over(channel: tuple[socket.socket, socket.socket] | None, listener: int) -> None:
    if channel is not None:
        socket.send_fds(channel[1], [b"\0"], [listener])
    os.close(listener)


def _arguments(pickled: bytes, names: Sequence[str], is_isolated: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = pickle.loads(pickled)
    if CONFINED_PYTHON in names:
        from rlqwen.rewards.sandbox.sandbox import confined_python

        arguments[CONFINED_PYTHON] = confined_python() if is_isolated else [sys.executable, "-I"]
    return arguments


def _limit_resources(setup: Setup) -> None:
    """Limit heap and private mappings (RLIMIT_DATA), of which importing torch or CUDA needs little.

    If isolated, also limit the address space, which includes shared memory, and the size of files.
    """
    import resource

    limits = {resource.RLIMIT_CORE: 0}
    if setup.memory_bytes is not None:
        limits[resource.RLIMIT_DATA] = setup.memory_bytes
    if setup.isolate:
        limits[resource.RLIMIT_FSIZE] = _MAX_FILE_BYTES
        if setup.memory_bytes is not None:
            limits[resource.RLIMIT_AS] = setup.memory_bytes
    for limit, value in limits.items():
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value if setup.isolate else most))


def _limit_processor_time(seconds: float | None) -> None:
    """Have the kernel kill this process after `seconds` more of processor time."""
    if seconds is None:
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), most))
