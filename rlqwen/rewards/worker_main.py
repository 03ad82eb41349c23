"""Call rewards in a worker process. Started by rlqwen.rewards.worker_handle; imports no torch unless a reward does.

A worker is two processes. The first one becomes a watchdog: it runs no user code, so nothing can stop it from ending
the whole process group, including programs that a reward started, when the trainer is gone. Its child calls the
rewards, in the main thread, because math-verify's timeouts are signal alarms.

Messages to a worker: first a Setup, then (index of the reward, number of samples, names of arguments that the worker
adds, pickled arguments).
Messages from a worker are JSON, because a pickle from a worker that ran hostile code could run code in the trainer:
[`ready`, pid], [`unloadable`, [index of the reward, traceback]] or [`unsafe`, why it cannot be isolated], then one
[`result`, CallResult] per call.
"""

import contextlib
import faulthandler
import io
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

from rlqwen.rewards.reward_call import call, describe
from rlqwen.rewards.reward_logging import LOGGERS
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
    alive_end, worker_end = os.pipe()
    watchdog_pid = os.getpid()
    worker_pid = os.fork()
    if worker_pid:
        connection.close()
        os.close(worker_end)
        _watch(worker_pid, alive_end, trainer_pid, trace_fd, setup)
    os.close(alive_end)
    _die_with(watchdog_pid)
    faulthandler.enable(file=trace_fd)
    faulthandler.register(TRACE_SIGNAL, file=trace_fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if the trainer's is closed
            stream.reconfigure(line_buffering=True)
    # A reward may print completions, and must not fail when the trainer's terminal is gone.
    sys.stdout, sys.stderr = (guarded(stream, keeps_going=True) for stream in (sys.stdout, sys.stderr))
    _serve(connection, setup, trainer_pid)


def _watch(worker_pid: int, alive_end: int, trainer_pid: int, trace_fd: int, setup: Setup) -> NoReturn:
    """Wait for the worker to end, and exit with its status.

    End the process group if the trainer ends first, or if the processes of an isolated worker exceed their limits.
    """
    signal.signal(TRACE_SIGNAL, signal.SIG_IGN)
    period = _WATCHDOG_PERIOD_ISOLATED if setup.isolate else _WATCHDOG_PERIOD
    while os.getppid() == trainer_pid:
        ready, _, _ = select.select([alive_end], [], [], period)
        # The pipe closes at once when the worker ends, unless a process that the reward forked still holds it open.
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
        if sys.stdout is not None:
            sys.stdout.flush()
        reply("result", result.to_dict())


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
