"""Call a reward and validate what it returns, in a worker or in the trainer's process."""

import asyncio
import inspect
import math
import numbers
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from rlqwen.rewards.reward_logging import RewardLogger
from rlqwen.types import CallStatus

MAX_TRACE_LENGTH = 20_000
"""Characters kept of a traceback, counted from its end, which is the most useful part."""


@dataclass(slots=True, frozen=True)
class CallResult:
    """Hold the result of one call of one reward on n samples. Every list has n entries."""

    rewards: list[float | None]
    """None if missing (status is not ok) or not applicable (status is ok)."""
    statuses: list[CallStatus]
    traces: list[str | None]
    """The reward's traceback, or what is wrong with its value. None if ok."""
    seconds: float
    is_settled: bool = True
    """False if the call failed as a whole, so that it is unknown which sample caused it."""
    metrics: Sequence[tuple[str, float]] = ()
    """What the reward passed to `log_metric`."""
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    """What the reward passed to `log_extra`: column -> n values."""

    @classmethod
    def failed(cls, status: CallStatus, trace: str, count: int, seconds: float) -> Self:
        """Return the result of a call that failed as a whole."""
        return cls([None] * count, [status] * count, [trace[-MAX_TRACE_LENGTH:]] * count, seconds, is_settled=False)


def call(
    function: Callable[..., Any],
    arguments: Callable[[], Mapping[str, Any]],
    count: int,
    *,
    loggers: Iterable[str] = (),
    let_through: tuple[type[BaseException], ...] = (),
) -> CallResult:
    """Call a reward on `count` samples and validate what it returns. Coroutines run to their end.

    `arguments` returns the reward's arguments; the log functions named in `loggers` are added to them. Every exception
    becomes a call status, BaseException included (math-verify's timeout is one), except those in `let_through`.
    """
    reward_logger = RewardLogger(count)
    started = time.perf_counter()
    try:
        returned = function(**arguments(), **reward_logger.functions(loggers))
        if inspect.isawaitable(returned):
            returned = _run_to_end(returned)
        values = as_list(returned)
        validated = [validate(value) for value in values or ()]
    except BaseException as error:
        if isinstance(error, let_through):
            raise
        trace = describe(error, frames_to_hide=1)
        return CallResult.failed("error", trace, count, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    if values is None or len(values) != count:
        given = f"a {type(returned).__name__}" if values is None else f"{len(values)} values"
        return CallResult.failed("invalid", f"returned {given} for {count} completions", count, seconds)
    rewards, traces = [reward for reward, _ in validated], [trace for _, trace in validated]
    statuses: list[CallStatus] = ["invalid" if trace else "ok" for trace in traces]
    return CallResult(rewards, statuses, traces, seconds, metrics=reward_logger.metrics, extras=reward_logger.extras)


def as_list(returned: Any) -> list[Any] | None:
    """Return a list, tuple, or 1-d array or tensor as a list, and None for anything else."""
    if isinstance(returned, list | tuple):
        return list(returned)
    if hasattr(returned, "tolist"):
        values = returned.tolist()
        return values if isinstance(values, list) else None
    return None


def validate(value: Any) -> tuple[float | None, str | None]:
    """Return (reward, what is wrong with `value`). None is valid: the reward does not apply to the sample."""
    if value is None:
        return None, None
    number = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(number, numbers.Real):
        return None, f"returned {_brief(value)}, a {type(value).__name__}, instead of a number or None"
    try:
        reward = float(number)
    except OverflowError:
        return None, "returned an integer too large for a float"
    if not math.isfinite(reward):
        return None, f"returned {reward}, which is not finite"
    return reward, None


def describe(error: BaseException, frames_to_hide: int = 0) -> str:
    """Return the traceback of `error` as text, without the first `frames_to_hide` frames, which are rlqwen's own."""
    frames = error.__traceback__
    for _ in range(frames_to_hide):
        if frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frames))
        return text[-MAX_TRACE_LENGTH:]
    except MemoryError:
        return f"{type(error).__name__} (no memory left for its traceback)"
    finally:
        # The frames keep alive what the reward had allocated.
        traceback.clear_frames(error.__traceback__)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _run_to_end(awaitable: Awaitable[Any]) -> Any:
    """Run a coroutine, in a new thread if this thread already runs an event loop, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_await(awaitable))
    box: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            box.append((asyncio.run(_await(awaitable)), None))
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            box.append((None, error))

    thread = threading.Thread(target=run, name="rlqwen-async-reward")
    thread.start()
    thread.join()
    value, error = box[0]
    if error is not None:
        raise error
    return value
