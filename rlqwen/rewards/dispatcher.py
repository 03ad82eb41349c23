"""Send reward calls to idle worker processes, and kill workers whose call passes its deadline."""

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

import cloudpickle

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure, RewardSpecError, RlqwenError
from rlqwen.rewards.reward_call import CallResult, describe
from rlqwen.rewards.sandbox.sandbox import minimal_environment, unavailable_message
from rlqwen.rewards.worker_handle import RewardWorker
from rlqwen.rewards.worker_main import Setup
from rlqwen.secrets import without_secrets
from rlqwen.types import CallStatus

_MAX_IDLE_DEATHS = 5
_RETIRE_WAIT = 1.0


@dataclass(slots=True, frozen=True, eq=False)
class WorkerCall:
    """Describe one call of one reward on one or more samples of a group."""

    index: int
    """Index of the reward among those that the workers hold."""
    count: int
    """Number of samples, and of entries in each list of `arguments`."""
    arguments: dict[str, Any]
    services: tuple[str, ...]
    """Arguments that the worker adds: names from rlqwen.rewards.reward_logging.LOGGERS, and CONFINED_PYTHON."""
    begin: Callable[[], None]
    """Called in the dispatcher's thread when the call is sent to a worker."""
    finish: Callable[[CallResult], None]
    """Called in the dispatcher's thread, after `begin`."""
    batch: object
    """Identifies the batch for `drop_queued`."""


@dataclass(slots=True)
class _WorkerSlot:
    """Hold a worker and the call that it is running."""

    worker: RewardWorker
    deadline: float | None
    """Seconds on the monotonic clock; None while the worker is idle."""
    is_ready: bool = False
    call: WorkerCall | None = None
    started: float = 0.0


class Dispatcher:
    """Run a pool of reward workers from one thread.

    Args:
        functions: pickled rewards.
        labels: one per reward, for messages.
        config: the `scoring` section of the recipe.
        changed: notified when a worker becomes ready, and when `error` is set; after an error no call is served.
        isolate: whether the workers run in the sandbox.
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
        self._queue: deque[WorkerCall] = deque()
        self._slots: list[_WorkerSlot] = []
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

    def submit(self, call: WorkerCall) -> None:
        """Queue a call; thread-safe."""
        self._queue.append(call)
        self._wake()

    def drop_queued(self, batch: object) -> None:
        """Drop the calls of a batch that have not begun."""
        for call in [call for call in tuple(self._queue) if call.batch is batch]:
            with contextlib.suppress(ValueError):  # the thread has just sent it
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
        # A full pipe wakes the thread anyway. If the pipe is closed, the thread has ended.
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_writer, b"\0")

    def _run(self) -> None:
        try:
            for _ in range(self._config.num_workers):
                self._start_worker()
            while not self._closing:
                self._send_calls()
                self._handle_events()
        except RlqwenError as error:
            self._fail(error)
        except BaseException as error:  # noqa: BLE001  the waiting thread raises it
            self._fail(RewardFailure(f"the scoring thread stopped:\n{describe(error)}"))
        finally:
            self._end_workers()
            if self.error is None:
                self._fail(RewardFailure("the scorer is closed: it calls no more rewards"))

    def _fail(self, error: RlqwenError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def _start_worker(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout
        self._slots.append(_WorkerSlot(RewardWorker(self._setup, self._environment, is_silent=self._isolate), deadline))

    def _send_calls(self) -> None:
        for slot in self._slots:
            while slot.is_ready and slot.call is None and self._queue:
                try:
                    call = self._queue.popleft()
                except IndexError:
                    return  # the trainer's thread has dropped it meanwhile
                self._begin(slot, call)

    def _begin(self, slot: _WorkerSlot, call: WorkerCall) -> None:
        call.begin()
        try:
            message = pickle.dumps((call.index, call.count, call.services, cloudpickle.dumps(call.arguments)))
        except Exception as error:  # noqa: BLE001  picklers raise anything
            trace = f"the arguments cannot be sent to a worker:\n{describe(error)}"
            call.finish(CallResult.failed("error", trace, call.count, 0.0))
            return
        slot.call, slot.started = call, time.monotonic()
        slot.deadline = slot.started + self._config.timeout
        slot.worker.send(message)

    def _handle_events(self) -> None:
        """Wait for the next message or deadline, and handle it."""
        deadlines = [slot.deadline for slot in self._slots if slot.deadline is not None]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        ready = wait([self._wake_reader, *(slot.worker.connection for slot in self._slots)], timeout)
        if self._wake_reader in ready:
            os.read(self._wake_reader.fileno(), 1 << 16)
        now = time.monotonic()
        for slot in list(self._slots):
            if slot.worker.connection in ready:
                self._receive(slot)
            elif slot.deadline is not None and now >= slot.deadline:
                self._expire(slot)

    def _receive(self, slot: _WorkerSlot) -> None:
        message = slot.worker.receive()
        if message is None:
            self._handle_death(slot)
            return
        kind, content = message
        if kind == "unsafe":
            raise RewardSpecError(unavailable_message(self._labels, content))
        if kind == "unloadable":
            index, trace = content
            raise RewardSpecError(
                f"reward {self._labels[index]} cannot be loaded in a worker process:\n{trace}\nMake what it needs "
                "importable there, or name it in scoring.in_process to call it in the trainer's process"
            )
        slot.deadline = None
        if kind == "ready":
            slot.is_ready = True
            with self._changed:
                self.num_ready += 1
                self._changed.notify_all()
        elif slot.call is not None:
            try:
                result = CallResult.from_dict(content, slot.call.count)
            except ValueError as error:
                result = CallResult.failed("invalid", str(error), slot.call.count, time.monotonic() - slot.started)
            self._finish(slot, result)

    def _finish(self, slot: _WorkerSlot, result: CallResult) -> None:
        call, slot.call, slot.deadline = slot.call, None, None
        self._idle_deaths = 0
        if call is not None:
            call.finish(result)

    def _expire(self, slot: _WorkerSlot) -> None:
        if slot.call is None:
            raise RewardFailure(
                f"a reward worker was not ready after scoring.start_timeout={self._config.start_timeout:g} s; "
                f"it imports {', '.join(self._labels)}"
            )
        trace = f"still running after scoring.timeout={self._config.timeout:g} s, at:\n{slot.worker.stack()}"
        self._replace(slot)
        seconds = time.monotonic() - slot.started
        self._finish(slot, CallResult.failed("timeout", trace, slot.call.count, seconds))

    def _handle_death(self, slot: _WorkerSlot) -> None:
        death = f"the worker process {slot.worker.describe_exit()}\n{slot.worker.trace_tail()}".rstrip()
        if not slot.is_ready:
            raise RewardFailure(f"{death}\nwhile it imported the rewards: {', '.join(self._labels)}")
        if slot.call is None:
            self._idle_deaths += 1
            if self._idle_deaths > _MAX_IDLE_DEATHS:
                raise RewardFailure(f"reward workers keep dying between calls; the last one: {death}")
        self._replace(slot)
        if slot.call is not None:
            seconds = time.monotonic() - slot.started
            status: CallStatus = "timeout" if "SIGXCPU" in death else "error"
            self._finish(slot, CallResult.failed(status, death, slot.call.count, seconds))

    def _replace(self, slot: _WorkerSlot) -> None:
        self._slots.remove(slot)
        slot.worker.kill()
        self.num_restarts += 1
        self._start_worker()

    def _end_workers(self) -> None:
        """Give idle workers a moment to exit by themselves, then kill the rest."""
        idle = [slot.worker for slot in self._slots if slot.deadline is None and self.error is None]
        for worker in idle:
            worker.retire()
        until = time.monotonic() + _RETIRE_WAIT
        while time.monotonic() < until and not all(worker.has_ended() for worker in idle):
            time.sleep(0.005)
        for slot in self._slots:
            slot.worker.kill()
        self._slots.clear()
