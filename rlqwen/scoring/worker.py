"""The process that calls rewards. Started by rlqwen.scoring.process; imports no torch unless a reward does.

It is two processes. The one that was started becomes a guard: it runs none of the user's code, so nothing can keep
it from ending the whole process group, programs that a reward started included, when the trainer is gone. Its child
calls the rewards, in its main thread, because math-verify's timeouts are signal alarms.

Messages to a worker: first a Setup, then (number of the reward, number of samples, loggers that it takes, pickled
arguments).
Messages from it: (`ready`, pid) or (`unloadable`, (number of the reward, traceback)), then (`result`, CallResult).
"""

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn

from rlqwen.scoring.outcomes import call, describe

TRACE_SIGNAL = signal.SIGUSR1
"""Makes a worker write where it is to its trace file, even from inside C code that holds the interpreter lock."""

_GUARD_PERIOD = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True, frozen=True)
class Setup:
    """What a worker needs before it can serve."""

    functions: tuple[bytes, ...]
    """The rewards, pickled."""
    memory_bytes: int | None


def main(connection_fd: int, trace_fd: int, trainer_pid: int) -> None:
    """Serve until the trainer closes its end of the connection or is gone."""
    del sys.argv[1:]  # what a reward imports may read them
    for fd in (connection_fd, trace_fd):
        os.set_inheritable(fd, False)
    # A handler rather than SIG_IGN, which programs started by a reward would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    alive_end, worker_end = os.pipe()
    guard_pid = os.getpid()
    worker_pid = os.fork()
    if worker_pid:
        os.close(connection_fd)
        os.close(worker_end)
        _guard(worker_pid, alive_end, trainer_pid)
    os.close(alive_end)
    _die_with(guard_pid)
    faulthandler.enable(file=trace_fd)
    faulthandler.register(TRACE_SIGNAL, file=trace_fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _serve(Connection(connection_fd))


def _guard(worker_pid: int, alive_end: int, trainer_pid: int) -> NoReturn:
    """Wait for the worker's end and pass its exit status on; end the process group if the trainer goes first."""
    signal.signal(TRACE_SIGNAL, signal.SIG_IGN)
    while os.getppid() == trainer_pid:
        ready, _, _ = select.select([alive_end], [], [], _GUARD_PERIOD)
        # The pipe's end is the quick sign; a process that the reward forked may still hold it open.
        ended, status = os.waitpid(worker_pid, 0 if ready else os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _die_with(guard_pid: int) -> None:
    """Ask the kernel to end this process when the guard ends, however that happens; Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard_pid:
        os._exit(1)


def _serve(connection: Connection) -> None:
    setup: Setup = pickle.loads(connection.recv_bytes())
    _limit_resources(setup.memory_bytes)
    functions = []
    for index, function in enumerate(setup.functions):
        try:
            functions.append(pickle.loads(function))
        except BaseException as error:  # noqa: BLE001  user code is imported here
            connection.send(("unloadable", (index, describe(error, frames_to_hide=1))))
            return
    connection.send(("ready", os.getpid()))
    while True:
        try:
            index, count, loggers, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        result = call(functions[index], partial(pickle.loads, arguments), count, loggers=loggers)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        connection.send(("result", result))


def _limit_resources(memory_bytes: int | None) -> None:
    """Bound heap and private mappings (RLIMIT_DATA): unlike address space, importing torch or CUDA needs little."""
    import resource

    _, most_core = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most_core))
    if memory_bytes is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, most))
