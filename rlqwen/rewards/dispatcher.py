"""Send reward calls to idle worker processes, and kill workers whose call passes its deadline."""

import contextlib
import dataclasses
import os
import pickle
import secrets
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure, RewardSpecError, RlqwenError
from rlqwen.rewards.reward_call import CallResult, describe
from rlqwen.rewards.sandbox.sandbox import minimal_environment, unavailable_message
from rlqwen.rewards.worker_handle import MAX_CALL_BYTES, RewardWorker
from rlqwen.rewards.worker_main import Setup
from rlqwen.rewards.worker_messages import Message, Ready, State, Unloadable, Unsafe, WorkerMisbehaved
from rlqwen.secrets import without_secrets
from rlqwen.terminal import get_logger
from rlqwen.types import CallStatus

logger = get_logger(__name__)

_MAX_IDLE_DEATHS = 5
_RETIRE_WAIT = 1.0
_MESSAGE_WAIT_S = 10.0
"""Seconds from the first byte of a message to its last."""


@dataclass(slots=True, frozen=True, eq=False)
class WorkerCall:
    """Describe one call of one reward on one or more samples of a group."""

    index: int
    """Index of the reward among those that the workers hold."""
    count: int
    """Number of samples, and of entries in each list of `arguments`."""
    arguments: dict[str, Any]
    seconds: float
    """Deadline: seconds from sending it to its result."""
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
    call: WorkerCall | None = None
    started: float = 0.0
    message_deadline: float | None = None
    """When a message that has begun to arrive must be complete; None if none has."""
    was_called: bool = False

    @property
    def is_idle(self) -> bool:
        return self.worker.messages.state is State.IDLE

    @property
    def first_deadline(self) -> float | None:
        return min((one for one in (self.deadline, self.message_deadline) if one is not None), default=None)


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
        self._warned = False
        self._closing = False
        self._owner_pid = os.getpid()
        self.error: RlqwenError | None = None
        self.num_restarts = 0
        self.num_ready = 0
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        self._wake_reader = os.fdopen(wake_reader, "rb", buffering=0)
        self._wake_writer = os.fdopen(wake_writer, "wb", buffering=0)
        self._wake_lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
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
        with self._wake_lock:
            if not self._wake_writer.closed:  # once it is, the thread has ended
                self._wake_writer.write(b"\0")  # writes nothing if the pipe is full, which wakes the thread anyway

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
        worker = RewardWorker(self._setup, len(self._labels), self._environment, is_silent=self._isolate)
        slot = _WorkerSlot(worker, deadline)
        self._slots.append(slot)
        self._selector.register(worker.connection, _wanted(worker), slot)

    def _send_calls(self) -> None:
        for slot in self._slots:
            while slot.is_idle and self._queue:
                try:
                    call = self._queue.popleft()
                except IndexError:
                    return  # the trainer's thread has dropped it meanwhile
                self._begin(slot, call)

    def _begin(self, slot: _WorkerSlot, call: WorkerCall) -> None:
        call.begin()
        number = secrets.randbits(63)  # an answer sent ahead cannot have it
        try:
            content = (number, call.index, call.count, call.services, cloudpickle.dumps(call.arguments))
            message = pickle.dumps(content)
            if len(message) > MAX_CALL_BYTES:
                raise ValueError(f"they take {len(message):,} bytes, and at most {MAX_CALL_BYTES:,} can be sent")
        except Exception as error:  # noqa: BLE001  picklers raise anything
            trace = f"the arguments cannot be sent to a worker:\n{describe(error)}"
            call.finish(CallResult.failed("error", trace, call.count, 0.0))
            return
        slot.call, slot.started, slot.was_called = call, time.monotonic(), True
        slot.deadline = slot.started + call.seconds
        slot.worker.messages.expect_reply(number, call.count, call.services)
        slot.worker.send(message)
        self._selector.modify(slot.worker.connection, _wanted(slot.worker), slot)

    def _handle_events(self) -> None:
        """Wait for the next bytes or deadline, and handle them. Never waits for one worker alone."""
        deadlines = [slot.first_deadline for slot in self._slots]
        until = min((one for one in deadlines if one is not None), default=None)
        for key, events in self._selector.select(None if until is None else max(0.0, until - time.monotonic())):
            if key.data is None:
                self._wake_reader.read(1 << 16)
                continue
            if events & selectors.EVENT_WRITE:
                key.data.worker.flush()
                self._selector.modify(key.fileobj, _wanted(key.data.worker), key.data)
            if events & selectors.EVENT_READ:
                self._receive(key.data)
        now = time.monotonic()
        for slot in list(self._slots):
            if slot.first_deadline is not None and now >= slot.first_deadline:
                self._expire(slot)

    def _receive(self, slot: _WorkerSlot) -> None:
        try:
            for message in slot.worker.receive():
                self._handle(slot, message)
        except EOFError:
            self._handle_death(slot)
            return
        except WorkerMisbehaved as error:
            self._handle_misbehaviour(slot, str(error))
            return
        if not slot.worker.messages.is_partial:
            slot.message_deadline = None
        elif slot.message_deadline is None:
            slot.message_deadline = time.monotonic() + _MESSAGE_WAIT_S

    def _handle(self, slot: _WorkerSlot, message: Message) -> None:
        match message:
            case Unsafe(reason):
                raise RewardSpecError(unavailable_message(self._labels, reason))
            case Unloadable(index, trace):
                raise RewardSpecError(
                    f"reward {self._labels[index]} cannot be loaded in a worker process:\n{trace}\nMake what it needs "
                    "importable there, or name it in scoring.in_process to call it in the trainer's process"
                )
            case Ready():
                slot.deadline = None
                with self._changed:
                    self.num_ready += 1
                    self._changed.notify_all()
            case CallResult():
                self._finish(slot, message)

    def _finish(self, slot: _WorkerSlot, result: CallResult) -> None:
        call, slot.call, slot.deadline = slot.call, None, None
        self._idle_deaths = 0
        if call is not None:
            # The worker's clock is not asked, because hostile code could set it.
            call.finish(dataclasses.replace(result, seconds=time.monotonic() - slot.started))

    def _expire(self, slot: _WorkerSlot) -> None:
        if slot.message_deadline is not None and slot.first_deadline == slot.message_deadline:
            self._handle_misbehaviour(slot, f"its message was not complete after {_MESSAGE_WAIT_S:g} s")
        elif slot.call is None:
            raise RewardFailure(
                f"a reward worker was not ready after scoring.start_timeout={self._config.start_timeout:g} s; "
                f"it imports {', '.join(self._labels)}"
            )
        else:
            after = f"{slot.call.seconds:.3g} s (scoring.timeout={self._config.timeout:g})"
            trace = f"still running after {after}, at:\n{slot.worker.stack()}"
            self._fail_call(slot, "timeout", trace)

    def _handle_misbehaviour(self, slot: _WorkerSlot, what: str) -> None:
        self._handle_end(slot, f"the worker process was ended because of what it sent: {what}", "error")

    def _handle_death(self, slot: _WorkerSlot) -> None:
        death = f"the worker process {slot.worker.describe_exit()}\n{slot.worker.trace_tail()}".rstrip()
        self._handle_end(slot, death, "timeout" if slot.worker.ran_out_of_processor_time() else "error")

    def _handle_end(self, slot: _WorkerSlot, reason: str, status: CallStatus) -> None:
        if slot.worker.messages.state in (State.STARTING, State.LOADING):
            raise RewardFailure(f"{reason}\nwhile it imported the rewards: {', '.join(self._labels)}")
        # A worker that was called may have been ended by what a sample left in it.
        if slot.call is None and not slot.was_called:
            self._idle_deaths += 1
            if self._idle_deaths > _MAX_IDLE_DEATHS:
                raise RewardFailure(f"reward workers keep dying between calls; the last one: {reason}")
        if slot.call is None and not self._warned:
            self._warned = True
            logger.warning("a reward worker was replaced between two calls; further ones are only counted: %s", reason)
        self._fail_call(slot, status, reason)

    def _fail_call(self, slot: _WorkerSlot, status: CallStatus, trace: str) -> None:
        """Replace a worker; its call, if it has one, has failed as a whole."""
        self._replace(slot)
        if slot.call is not None:
            self._finish(slot, CallResult.failed(status, trace, slot.call.count, 0.0))

    def _replace(self, slot: _WorkerSlot) -> None:
        self._slots.remove(slot)
        self._selector.unregister(slot.worker.connection)
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
        self._selector.close()
        with self._wake_lock:
            self._wake_reader.close()
            self._wake_writer.close()


def _wanted(worker: RewardWorker) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.has_more_to_send else 0)
