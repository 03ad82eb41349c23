"""Tokenize in several processes: send parts of the rows to workers, and return their results in order."""

import contextlib
import os
import pickle
import queue
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from rlqwen.errors import ResourceError

Row = dict[str, Any]
Result = TypeVar("Result")

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[2:]; from rlqwen.data.worker_pool import main; main(int(sys.argv[1]))"
_PREFETCH = 2
"""Parts in flight per worker, so that no worker waits for its next part."""


class JobNotPicklable(Exception):
    """Report a job that cannot be sent to another process."""


class Worker:
    """Run parts of a job in another process.

    The process is not started by multiprocessing, which would either import the user's `__main__` again, and so start
    the training of most scripts, or fork a process that has threads.
    """

    def __init__(self, job: bytes) -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *map(str, sys.path)]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            # Each process has one CPU, so it must not start threads for all CPUs.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._job: bytes | None = job
        """Sent with the first part, because sending blocks until the process has started, and all should start at once."""

    def run(self, message: bytes) -> Any:
        """Return the worker's result, or raise the worker's error."""
        try:
            if self._job is not None:
                self._connection.send_bytes(self._job)
                self._job = None
            self._connection.send_bytes(message)
            succeeded, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise ResourceError(
                "a tokenizing process has died, perhaps because it ran out of memory: lower dataset_num_proc"
            ) from None
        if not succeeded:
            raise answer
        return answer

    def close(self) -> None:
        """Kill the process; call this once."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Run `function(job, start, rows, *options)`, which must be picklable, in `count` workers."""

    def __init__(self, count: int, function: Any, job: Any, *options: Any) -> None:
        """Start the workers; raise JobNotPicklable if the job cannot be pickled."""
        try:
            message = pickle.dumps((function, job, options))
        except Exception as error:  # a custom tokenizer may raise anything
            raise JobNotPicklable(str(error)) from error
        self._workers = [Worker(message) for _ in range(count)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tokenize")

    def map(self, parts: Iterator[tuple[int, Sequence[Row]]]) -> Iterator[Any]:
        """Yield the result of each part, in order; only a few parts are in memory."""
        waiting: deque[Future[Any]] = deque()
        for part in parts:
            waiting.append(self._threads.submit(self._run, pickle.dumps(part)))
            if len(waiting) > _PREFETCH * len(self._workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Kill all workers, even if they are busy."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, message: bytes) -> Any:
        worker = self._free.get()
        try:
            return worker.run(message)
        finally:
            self._free.put(worker)


def main(descriptor: int) -> None:
    """Run parts of a job in a worker process until the connection is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C and kills this process
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        function, job, options = pickle.loads(connection.recv_bytes())
        while True:
            start, rows = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((True, function(job, start, rows, *options)))
            except Exception as error:  # noqa: BLE001 - every error is sent to the trainer
                answer = _pickle_error(error)
            connection.send_bytes(answer)


def _pickle_error(error: Exception) -> bytes:
    """Pickle an error; one that cannot be pickled becomes a RuntimeError with its text."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # noqa: BLE001 - pickling may raise anything
        answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return answer
