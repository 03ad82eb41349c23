"""The process that calls rewards. Started by rlqwen.rewards.worker_handle; imports no torch unless a reward does.

It is two processes. The one that was started becomes a guard: it runs none of the user's code, so nothing can keep
it from ending the whole process group, programs that a reward started included, when the trainer is gone. Its child
calls the rewards, in its main thread, because math-verify's timeouts are signal alarms.

Messages to a worker: first a Setup, then (number of the reward, number of samples, names that it takes beside its
arguments, pickled arguments).
Messages from it, in JSON, because a pickle from a worker that ran hostile code could run more of it in the trainer:
[`ready`, pid], [`unloadable`, [number of the reward, traceback]] or [`unsafe`, why it can't be isolated], then
[`result`, CallResult].
"""

import contextlib
import faulthandler
import json
import math
import os
import pickle
import select
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from rlqwen.rewards.call import call, describe
from rlqwen.rewards.reward_logging import LOGGERS

TRACE_SIGNAL = signal.SIGUSR1
"""Makes a worker write where it is to its trace file, even from inside C code that holds the interpreter lock."""

CONFINED_PYTHON = "confined_python"
"""An argument of isolated rewards that name it: the start of a command line that runs a Python script confined."""

MAX_PROCESSES = 32
"""Processes of one isolated worker."""

_GUARD_PERIOD = 0.2
_GUARD_PERIOD_ISOLATED = 0.05
_PR_SET_PDEATHSIG = 1
_MAX_FILE_BYTES = 1 << 20


@dataclass(slots=True, frozen=True)
class Setup:
    """What a worker needs before it can serve."""

    functions: tuple[bytes, ...]
    """The rewards, pickled."""
    memory_bytes: int | None
    """Of the process; isolated, also of it and all that it started together."""
    cpu_seconds: float | None
    """Processor time of one call, of all threads of the process."""
    isolate: bool
    """Whether to serve behind the boundary of rlqwen.rewards.sandbox.sandbox."""


def main(connection_fd: int, trace_fd: int, trainer_pid: int) -> None:
    """Serve until the trainer closes its end of the connection or is gone."""
    del sys.argv[1:]  # what a reward imports may read them
    for fd in (connection_fd, trace_fd):
        os.set_inheritable(fd, False)
    # A handler rather than SIG_IGN, which programs started by a reward would inherit.
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to the trainer too, which then saves
        signal.signal(number, lambda *_: None)
    connection = Connection(connection_fd)
    setup: Setup = pickle.loads(connection.recv_bytes())
    alive_end, worker_end = os.pipe()
    guard_pid = os.getpid()
    worker_pid = os.fork()
    if worker_pid:
        connection.close()
        os.close(worker_end)
        _guard(worker_pid, alive_end, trainer_pid, trace_fd, setup)
    os.close(alive_end)
    _die_with(guard_pid)
    faulthandler.enable(file=trace_fd)
    faulthandler.register(TRACE_SIGNAL, file=trace_fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _serve(connection, setup, trainer_pid)


def _guard(worker_pid: int, alive_end: int, trainer_pid: int, trace_fd: int, setup: Setup) -> NoReturn:
    """Wait for the worker's end and pass its exit status on; end the process group if the trainer goes first, or if
    an isolated worker's processes take more than they may."""
    signal.signal(TRACE_SIGNAL, signal.SIG_IGN)
    period = _GUARD_PERIOD_ISOLATED if setup.isolate else _GUARD_PERIOD
    while os.getppid() == trainer_pid:
        ready, _, _ = select.select([alive_end], [], [], period)
        # The pipe's end is the quick sign; a process that the reward forked may still hold it open.
        ended, status = os.waitpid(worker_pid, 0 if ready else os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        excess = _excess(setup.memory_bytes or math.inf) if setup.isolate else None
        if excess:
            os.write(trace_fd, f"{excess}\n".encode())
            break
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _excess(max_bytes: float) -> str | None:
    """What the processes of this group take too much of, in words."""
    group, guard, num_bytes, count = os.getpgrp(), os.getpid(), 0, 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == guard:
            continue
        with contextlib.suppress(OSError):
            # The name of the program, which may hold anything, stands in brackets before the other fields.
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


def _die_with(guard_pid: int) -> None:
    """Ask the kernel to end this process when the guard ends, however that happens; Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard_pid:
        os._exit(1)


def _serve(connection: Connection, setup: Setup, trainer_pid: int) -> None:
    def reply(kind: str, content: Any) -> None:
        connection.send_bytes(json.dumps([kind, content]).encode())

    _limit_resources(setup)
    if setup.isolate:
        from rlqwen.rewards.sandbox.sandbox import isolate

        try:
            isolate(trainer_pid)
        except OSError as error:
            reply("unsafe", str(error))
            return
    functions = []
    for index, function in enumerate(setup.functions):
        try:
            functions.append(pickle.loads(function))
        except BaseException as error:  # noqa: BLE001  user code is imported here
            reply("unloadable", (index, describe(error, frames_to_hide=1)))
            return
    reply("ready", os.getpid())
    while True:
        try:
            index, count, names, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        _limit_processor_time(setup.cpu_seconds)
        arguments = partial(_arguments, arguments, names, setup.isolate)
        result = call(functions[index], arguments, count, loggers=[name for name in names if name in LOGGERS])
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        reply("result", result.plain())


def _arguments(pickled: bytes, names: Sequence[str], is_isolated: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = pickle.loads(pickled)
    if CONFINED_PYTHON in names:
        from rlqwen.rewards.sandbox.sandbox import confined_python

        arguments[CONFINED_PYTHON] = confined_python() if is_isolated else [sys.executable, "-I"]
    return arguments


def _limit_resources(setup: Setup) -> None:
    """Bound heap and private mappings (RLIMIT_DATA): unlike address space, importing torch or CUDA needs little.

    Isolated, bound the address space too, which counts memory that processes share, and the size of a file.
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
    """Allow so many seconds from now on; past them the kernel ends the process."""
    if seconds is None:
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), most))
