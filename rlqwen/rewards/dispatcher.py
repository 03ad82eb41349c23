"""Hands reward calls to worker processes as they come free, and ends those that outlive their deadline."""

import contextlib
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure, RewardSpecError, RlqwenError
from rlqwen.rewards.call import CallResult, describe
from rlqwen.rewards.sandbox.sandbox import minimal_environment, refusal
from rlqwen.rewards.worker_handle import RewardWorker
from rlqwen.rewards.worker_main import Setup
from rlqwen.secrets import without_secrets
from rlqwen.types import Outcome

_MAX_IDLE_DEATHS = 5
_RETIRE_WAIT = 1.0


@dataclass(slots=True, frozen=True, eq=False)
class Call:
    """One call of one reward on one or more samples of a group."""

    index: int
    """Number of the reward among those that the workers hold."""
    count: int
    """Samples; `arguments` has so many of each."""
    arguments: dict[str, Any]
    services: tuple[str, ...]
    """Names that the reward takes beside its arguments: of rlqwen.rewards.reward_logging.LOGGERS, and CONFINED_PYTHON."""
    begin: Callable[[], None]
    """Called in the dispatcher's thread, when a worker takes it up."""
    finish: Callable[[CallResult], None]
    """Called in the dispatcher's thread, after `begin`."""
    batch: object
    """What `drop_queued` knows it by."""


@dataclass(slots=True)
class _Seat:
    """A worker and what it is doing."""

    worker: RewardWorker
    deadline: float | None
    """On the monotonic clock; None while it has nothing to do."""
    is_ready: bool = False
    call: Call | None = None
    started: float = 0.0


class Dispatcher:
    """A pool of reward workers and the one thread that talks to them.

    `functions` are pickled rewards and `labels` what to call them in messages. `changed` is notified when `error`
    is set: from then on nothing is served any more. `isolate`: all its workers are isolated.
    """

    def __init__(
        self,
        functions: Sequence[bytes],
        labels: Sequence[str],
        config: ScoringConfig,
        changed: threading.Condition,
        *,
        isolate: bool = False,
    ) -> None:
        memory_bytes = None if config.memory_gib is None else int(config.memory_gib * 2**30)
        self._setup = pickle.dumps(Setup(tuple(functions), memory_bytes, config.cpu_seconds, isolate))
        self._isolate = isolate
        self._environment = (
            minimal_environment(os.environ) if isolate else without_secrets(os.environ, allowed=config.env)
        )
        self._labels = labels
        self._config = config
        self._changed = changed
        self._queue: deque[Call] = deque()
        self._seats: list[_Seat] = []
        self._idle_deaths = 0
        self._closing = False
        self._owner_pid = os.getpid()
        self.error: RlqwenError | None = None
        self.num_restarts = 0
        self.num_ready = 0
        wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._wake_reader = Connection(wake_reader, writable=False)
        self._thread = threading.Thread(target=self._run, name="rlqwen-scoring", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call; thread-safe."""
        self._queue.append(call)
        self._wake()

    def drop_queued(self, batch: object) -> None:
        """Forget the calls of a batch that have not begun."""
        for call in [call for call in tuple(self._queue) if call.batch is batch]:
            with contextlib.suppress(ValueError):  # the thread has just begun it
                self._queue.remove(call)

    def close(self) -> None:
        """End all workers and the thread; idempotent."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the trainer that exits must not end the trainer's workers
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        # A full pipe wakes as well as one more byte; a closed one has no one to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_writer, b"\0")

    def _run(self) -> None:
        try:
            for _ in range(self._config.num_workers):
                self._start_worker()
            while not self._closing:
                self._hand_out()
                self._attend()
        except RlqwenError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001  the waiting thread must hear of it
            self._fail(RewardFailure(f"the scoring thread stopped:\n{describe(error)}"))
        finally:
            self._end_workers()
            if self.error is None:
                self._fail(RewardFailure("the scorer is closed: it calls no rewards any more"))

    def _fail(self, error: RlqwenError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def _start_worker(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout
        self._seats.append(_Seat(RewardWorker(self._setup, self._environment, is_silent=self._isolate), deadline))

    def _hand_out(self) -> None:
        for seat in self._seats:
            while seat.is_ready and seat.call is None and self._queue:
                try:
                    call = self._queue.popleft()
                except IndexError:
                    return  # dropped by the trainer's thread meanwhile
                self._begin(seat, call)

    def _begin(self, seat: _Seat, call: Call) -> None:
        call.begin()
        try:
            message = pickle.dumps((call.index, call.count, call.services, cloudpickle.dumps(call.arguments)))
        except Exception as error:  # noqa: BLE001  picklers raise anything
            trace = f"the arguments cannot be sent to a worker:\n{describe(error)}"
            call.finish(CallResult.failed("error", trace, call.count, 0.0))
            return
        seat.call, seat.started = call, time.monotonic()
        seat.deadline = seat.started + self._config.timeout
        seat.worker.send(message)

    def _attend(self) -> None:
        """Wait for the next message or deadline, and deal with it."""
        deadlines = [seat.deadline for seat in self._seats if seat.deadline is not None]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = wait([self._wake_reader, *(seat.worker.connection for seat in self._seats)], patience)
        if self._wake_reader in ready:
            os.read(self._wake_reader.fileno(), 1 << 16)
        now = time.monotonic()
        for seat in list(self._seats):
            if seat.worker.connection in ready:
                self._receive(seat)
            elif seat.deadline is not None and now >= seat.deadline:
                self._expire(seat)

    def _receive(self, seat: _Seat) -> None:
        message = seat.worker.receive()
        if message is None:
            self._bury(seat)
            return
        kind, content = message
        if kind == "unsafe":
            raise RewardSpecError(refusal(self._labels, content))
        if kind == "unloadable":
            index, trace = content
            raise RewardSpecError(
                f"reward {self._labels[index]} cannot be loaded in a worker process:\n{trace}\nMake what it needs "
                "importable there, or name it in scoring.in_process to call it in the trainer's process"
            )
        seat.deadline = None
        if kind == "ready":
            seat.is_ready = True
            with self._changed:
                self.num_ready += 1
                self._changed.notify_all()
        elif seat.call is not None:
            try:
                result = CallResult.from_plain(content, seat.call.count)
            except ValueError as error:
                result = CallResult.failed("invalid", str(error), seat.call.count, time.monotonic() - seat.started)
            self._finish(seat, result)

    def _finish(self, seat: _Seat, result: CallResult) -> None:
        call, seat.call, seat.deadline = seat.call, None, None
        self._idle_deaths = 0
        if call is not None:
            call.finish(result)

    def _expire(self, seat: _Seat) -> None:
        if seat.call is None:
            raise RewardFailure(
                f"a reward worker was not ready after scoring.start_timeout={self._config.start_timeout:g} s; "
                f"it imports {', '.join(self._labels)}"
            )
        trace = f"still running after scoring.timeout={self._config.timeout:g} s, at:\n{seat.worker.where()}"
        self._replace(seat)
        seconds = time.monotonic() - seat.started
        self._finish(seat, CallResult.failed("timeout", trace, seat.call.count, seconds))

    def _bury(self, seat: _Seat) -> None:
        death = f"the worker process {seat.worker.death()}\n{seat.worker.last_words()}".rstrip()
        if not seat.is_ready:
            raise RewardFailure(f"{death}\nwhile it imported the rewards: {', '.join(self._labels)}")
        if seat.call is None:
            self._idle_deaths += 1
            if self._idle_deaths > _MAX_IDLE_DEATHS:
                raise RewardFailure(f"reward workers keep dying between calls; the last one: {death}")
        self._replace(seat)
        if seat.call is not None:
            seconds = time.monotonic() - seat.started
            outcome: Outcome = "timeout" if "SIGXCPU" in death else "error"
            self._finish(seat, CallResult.failed(outcome, death, seat.call.count, seconds))

    def _replace(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        seat.worker.kill()
        self.num_restarts += 1
        self._start_worker()

    def _end_workers(self) -> None:
        """Let idle workers end by themselves for a moment, and kill what is left."""
        idle = [seat.worker for seat in self._seats if seat.deadline is None and self.error is None]
        for worker in idle:
            worker.retire()
        until = time.monotonic() + _RETIRE_WAIT
        while time.monotonic() < until and not all(worker.has_ended() for worker in idle):
            time.sleep(0.005)
        for seat in self._seats:
            seat.worker.kill()
        self._seats.clear()
