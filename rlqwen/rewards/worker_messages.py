"""Write and check what a reward worker sends: each message once, only when due, of bounded size, every value of its type.

Code that a worker runs may write to the trainer whatever it likes. Messages are JSON lists, each after its length in 4
bytes, because a pickle from a worker that ran hostile code could run code in the trainer:

    state      message                                                            next state
    starting   ["started"]                                                        loading
    starting   ["unsafe", why the worker cannot be isolated]                      ended
    loading    ["ready"]                                                          idle
    loading    ["unloadable", index of the reward, traceback]                     ended
    called     ["result", number, rewards, statuses, traces, metrics, extras]     idle
    called     ["failed", number, status, traceback]                              idle

`number` is that of the call, which nothing but the call itself says. The worker imports no reward before it has said
`started`, so that no reward can claim that the machine cannot isolate it.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from rlqwen.rewards.reward_call import MAX_TRACE_LENGTH, CallResult
from rlqwen.rewards.reward_logging import MAX_NAME_LENGTH
from rlqwen.terminal import printable

HEADER = struct.Struct("!i")

_MAX_BYTES = 1 << 18
"""Maximum size of a message, besides the values of its samples; the longest traceback takes less."""
_SAMPLE_BYTES = 1 << 13
_EXTRAS_BYTES = 1 << 18
"""Maximum size of a sample's values of `log_extra`."""
_MAX_SAMPLE_TRACE = 500
_MAX_INTEGER = 1 << 63


class WorkerMisbehaved(Exception):
    """Report a message that was not due, too large or malformed."""


class State(Enum):
    """Name what a worker may say next."""

    STARTING = "'started' or 'unsafe'"
    LOADING = "'ready' or 'unloadable'"
    IDLE = "nothing"
    CALLED = "'result' or 'failed'"
    ENDED = "nothing more"


@dataclass(slots=True, frozen=True)
class Unsafe:
    """Report that a worker cannot be isolated."""

    reason: str


@dataclass(slots=True, frozen=True)
class Unloadable:
    """Report that a reward cannot be loaded in a worker."""

    index: int
    trace: str


@dataclass(slots=True, frozen=True)
class Ready:
    """Report that a worker can be called."""


Message = Unsafe | Unloadable | Ready | CallResult


def reply_limit(count: int, services: Sequence[str]) -> int:
    """Return the maximum size in bytes of the reply to a call on `count` samples that is offered `services`."""
    return _MAX_BYTES + count * (_SAMPLE_BYTES + (_EXTRAS_BYTES if "log_extra" in services else 0))


def reply(number: int, result: CallResult, services: Sequence[str]) -> bytes:
    """Return the message for the result of a call, as JSON. A result beyond the limits becomes a failure that says so."""
    if not result.is_settled:
        status, trace = result.statuses[0], result.traces[0] or ""
        return message("failed", number, status, clean(trace, MAX_TRACE_LENGTH))
    traces = [None if trace is None else clean(trace, _MAX_SAMPLE_TRACE) for trace in result.traces]
    sent = message("result", number, result.rewards, result.statuses, traces, result.metrics, result.extras)
    limit = reply_limit(len(result.rewards), services)
    if len(sent) <= limit:
        return sent
    trace = (
        f"what it logged makes a reply of {len(sent):,} bytes, more than {limit:,} for {len(result.rewards)} samples"
    )
    return message("failed", number, "invalid", trace)


def message(*content: Any) -> bytes:
    """Return a message as JSON, without its length."""
    return json.dumps(content).encode()


def clean(text: str, limit: int) -> str:
    """Return the end of a text, in which each character that could control a terminal is written as an escape."""
    return printable(text[-limit:])[-limit:]


class WorkerMessages:
    """Hold the trainer's view of one worker: what it may say now, and the bytes of a message that is not complete."""

    def __init__(self, num_rewards: int) -> None:
        self.state = State.STARTING
        self._num_rewards = num_rewards
        self._buffer = bytearray()
        self._number = self._count = 0
        self._services: Sequence[str] = ()

    @property
    def is_partial(self) -> bool:
        """Tell whether a message has begun to arrive."""
        return bool(self._buffer)

    def expect_reply(self, number: int, count: int, services: Sequence[str]) -> None:
        """Begin a call on `count` samples; the worker must be idle."""
        if self.state is not State.IDLE:
            raise RuntimeError(f"a worker was called whose next message is {self.state.value}")
        self.state, self._number, self._count, self._services = State.CALLED, number, count, services

    def feed(self, data: bytes) -> list[Message]:
        """Take bytes from the worker and return the messages that they complete; raise WorkerMisbehaved."""
        self._buffer += data
        found: list[Message] = []
        while self._buffer:
            if self.state in (State.IDLE, State.ENDED):
                raise WorkerMisbehaved(f"it sent {len(self._buffer):,} bytes or more, and {self.state.value} was due")
            if len(self._buffer) < HEADER.size:
                break
            (size,) = HEADER.unpack_from(self._buffer)
            limit = reply_limit(self._count, self._services) if self.state is State.CALLED else _MAX_BYTES
            if not 0 <= size <= limit:
                raise WorkerMisbehaved(f"it sent a message of {size:,} bytes, and at most {limit:,} are allowed")
            if len(self._buffer) < HEADER.size + size:
                break
            content = bytes(self._buffer[HEADER.size : HEADER.size + size])
            del self._buffer[: HEADER.size + size]
            read = self._read(content)
            if read is not None:
                found.append(read)
        return found

    def _read(self, content: bytes) -> Message | None:
        """Read a message and enter the next state; None for `started`."""
        try:
            kind, *values = json.loads(content, parse_constant=_refuse_constant)
            match self.state, kind:
                case State.STARTING, "started" if not values:
                    self.state = State.LOADING
                    return None
                case State.STARTING, "unsafe":
                    (reason,) = values
                    self.state = State.ENDED
                    return Unsafe(clean(_text(reason, MAX_TRACE_LENGTH), MAX_TRACE_LENGTH))
                case State.LOADING, "ready" if not values:
                    self.state = State.IDLE
                    return Ready()
                case State.LOADING, "unloadable":
                    index, trace = values
                    self.state = State.ENDED
                    return Unloadable(
                        _index(index, self._num_rewards), clean(_text(trace, MAX_TRACE_LENGTH), MAX_TRACE_LENGTH)
                    )
                case State.CALLED, "result" | "failed":
                    number, *parts = values
                    if type(number) is not int or number != self._number:
                        raise WorkerMisbehaved(f"it answered call {_brief(number)} instead of the one in progress")
                    result = self._result(*parts) if kind == "result" else self._failure(*parts)
                    self.state = State.IDLE
                    return result
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise WorkerMisbehaved(f"it sent a malformed message: {_one_line(str(error))}") from None
        raise WorkerMisbehaved(f"it sent {_brief(kind)}, and {self.state.value} was due")

    def _failure(self, status: Any, trace: Any) -> CallResult:
        if status not in ("error", "invalid"):
            raise ValueError(f"status {_brief(status)}")
        return CallResult.failed(status, clean(_text(trace, MAX_TRACE_LENGTH), MAX_TRACE_LENGTH), self._count, 0.0)

    def _result(self, rewards: Any, statuses: Any, traces: Any, metrics: Any, extras: Any) -> CallResult:
        samples = list(zip(*(_list(values, self._count) for values in (rewards, statuses, traces)), strict=True))
        for reward, status, trace in samples:
            if status not in ("ok", "invalid") or (trace is None) != (status == "ok"):
                raise ValueError(f"status {_brief(status)}")
            if reward is not None and status != "ok":
                raise ValueError("a reward that is missing has a value")
            _text("" if trace is None else trace, _MAX_SAMPLE_TRACE)
        return CallResult(
            [None if reward is None else _number(reward) for reward, _, _ in samples],
            [status for _, status, _ in samples],
            [None if trace is None else clean(trace, _MAX_SAMPLE_TRACE) for _, _, trace in samples],
            0.0,
            metrics=self._metrics(metrics),
            extras=self._extras(extras),
        )

    def _metrics(self, metrics: Any) -> list[tuple[str, float]]:
        if not isinstance(metrics, list) or (metrics and "log_metric" not in self._services):
            raise ValueError("metrics that the reward cannot have logged")
        pairs = [_list(pair, 2) for pair in metrics]
        return [(clean(_text(name, MAX_NAME_LENGTH), MAX_NAME_LENGTH), _number(value)) for name, value in pairs]

    def _extras(self, extras: Any) -> dict[str, list[Any]]:
        if not isinstance(extras, dict) or (extras and "log_extra" not in self._services):
            raise ValueError("extras that the reward cannot have logged")
        for values in extras.values():
            for value in _list(values, self._count):
                if isinstance(value, int | float):
                    _number(value, allow_bool=True)
                elif value is not None and not isinstance(value, str):
                    raise ValueError(f"a {type(value).__name__} among the extras")
                if isinstance(value, int) and not -_MAX_INTEGER <= value < _MAX_INTEGER:
                    raise ValueError("an integer beyond 64 bits among the extras")
        return {clean(_text(name, MAX_NAME_LENGTH), MAX_NAME_LENGTH): values for name, values in extras.items()}


def _number(value: Any, *, allow_bool: bool = False) -> float:
    if not isinstance(value, int | float) or (isinstance(value, bool) and not allow_bool):
        raise ValueError(f"{_brief(value)} instead of a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} instead of a finite number")
    return number


def _text(value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_brief(value)} instead of a text")
    if len(value) > limit:
        raise ValueError(f"a text of {len(value):,} characters, and at most {limit:,} are allowed")
    return value


def _list(value: Any, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise ValueError(f"{_brief(value)} instead of a list of {length}")
    return value


def _index(value: Any, length: int) -> int:
    if type(value) is not int or not 0 <= value < length:
        raise ValueError(f"{_brief(value)} instead of the index of a reward")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _brief(value: Any) -> str:
    """Name foreign data in one line."""
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])
