"""Tokenizing in several processes: parts of the rows go out, what became of them comes back in order."""

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
_AHEAD = 2
"""Parts on their way per worker, so that none waits for its next."""


class JobNotPicklable(Exception):
    """Error for a job that cannot be sent to another process."""


class Worker:
    """One process that works on parts of a job.

    Not started by multiprocessing: that would import the user's `__main__` again, which in most training scripts starts
    the training, or fork a process that has threads.
    """

    def __init__(self, job: bytes) -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *map(str, sys.path)]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            # Each process has a CPU of its own, and must not start threads for all of them.
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._job: bytes | None = job
        """Goes with the first part: a process takes it only once it has started, and all should start at once."""

    def run(self, message: bytes) -> Any:
        """Return the worker's answer; raise what it raised."""
        try:
            if self._job is not None:
                self._connection.send_bytes(self._job)
                self._job = None
            self._connection.send_bytes(message)
            succeeded, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise ResourceError(
                "a process that tokenizes has ended, perhaps out of memory: lower dataset_num_proc"
            ) from None
        if not succeeded:
            raise answer
        return answer

    def close(self) -> None:
        """End the process; may be called once."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """`count` workers that call `function(job, start, rows, *options)`, which must pickle."""

    def __init__(self, count: int, function: Any, job: Any, *options: Any) -> None:
        """Raise JobNotPicklable for a job that does not pickle."""
        try:
            message = pickle.dumps((function, job, options))
        except Exception as error:  # whatever a tokenizer of somebody's own raises
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
            if len(waiting) > _AHEAD * len(self._workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """End all workers, whatever they are doing."""
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
    """Work in a process of the pool until the other end is gone."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        function, job, options = pickle.loads(connection.recv_bytes())
        while True:
            start, rows = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((True, function(job, start, rows, *options)))
            except Exception as error:  # noqa: BLE001 - all of them are for the trainer
                answer = _portable(error)
            connection.send_bytes(answer)


def _portable(error: Exception) -> bytes:
    """Pickle an error; one that cannot be pickled becomes a RuntimeError with its text."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # noqa: BLE001 - whatever pickling raises
        answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return answer
