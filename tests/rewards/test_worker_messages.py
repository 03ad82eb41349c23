"""Test what the trainer takes from a worker, with valid, odd and random bytes; without worker processes."""

import math
import random
from typing import Any

import pytest

from rlqwen.rewards.reward_call import MAX_TRACE_LENGTH, CallResult
from rlqwen.rewards.reward_logging import RewardLogger
from rlqwen.rewards.worker_messages import (
    HEADER,
    Ready,
    State,
    Unloadable,
    Unsafe,
    WorkerMessages,
    WorkerMisbehaved,
    clean,
    message,
    reply,
    reply_limit,
)
from tests.rewards.odd_messages import odd_message

SERVICES = ("log_metric", "log_extra")


def framed(text: bytes) -> bytes:
    return HEADER.pack(len(text)) + text


def called(number: int = 7, count: int = 2, services: tuple[str, ...] = SERVICES) -> WorkerMessages:
    messages = WorkerMessages(num_rewards=1)
    assert messages.feed(framed(message("started")) + framed(message("ready"))) == [Ready()]
    messages.expect_reply(number, count, services)
    return messages


def test_a_result_arrives_as_it_was_sent_in_any_pieces() -> None:
    result = CallResult(
        [1.5, None],
        ["ok", "invalid"],
        [None, "returned 'x'\x1b[2J"],
        0.0,
        metrics=[("m", 2.0)],
        extras={"c": ["七", None]},
    )
    sent = framed(reply(7, result, SERVICES))
    for size in (1, 3, len(sent)):
        messages = called()
        found = [one for start in range(0, len(sent), size) for one in messages.feed(sent[start : start + size])]
        assert found == [
            CallResult([1.5, None], ["ok", "invalid"], [None, "returned 'x'\\x1b[2J"], 0.0, metrics=[("m", 2.0)], extras=result.extras)
        ]  # fmt: skip
        assert messages.state is State.IDLE


def test_a_failure_and_the_longest_traceback_arrive() -> None:
    (found,) = called().feed(framed(reply(7, CallResult.failed("error", "\U0001f600" * 30_000, 2, 0.0), ())))
    assert isinstance(found, CallResult)
    assert found.statuses == ["error", "error"]
    assert found.traces == ["\U0001f600" * MAX_TRACE_LENGTH] * 2
    assert not found.is_settled


def test_a_reply_that_is_too_large_fails_with_the_reason() -> None:
    logged = CallResult([1.0], ["ok"], [None], 0.0, extras={"c": ["x" * 10**6]})
    (found,) = called(count=1).feed(framed(reply(7, logged, SERVICES)))
    assert isinstance(found, CallResult)
    assert found.statuses == ["invalid"]
    assert "makes a reply of 1,000,0" in str(found.traces[0])


def test_a_worker_that_cannot_serve_says_why() -> None:
    assert WorkerMessages(1).feed(framed(message("unsafe", "no\x1b Landlock"))) == [Unsafe("no\\x1b Landlock")]
    started = WorkerMessages(1)
    assert started.feed(framed(message("started"))) == []
    assert started.feed(framed(message("unloadable", 0, "ImportError"))) == [Unloadable(0, "ImportError")]
    with pytest.raises(WorkerMisbehaved, match="nothing more was due"):
        started.feed(framed(message("ready")))


def test_a_reward_that_was_imported_cannot_claim_that_the_machine_is_unsafe() -> None:
    started = WorkerMessages(1)
    started.feed(framed(message("started")))
    with pytest.raises(WorkerMisbehaved, match="'unsafe', and 'ready' or 'unloadable' was due"):
        started.feed(framed(message("unsafe", "chosen text")))


def test_what_rewards_log_fits_the_messages() -> None:
    logger = RewardLogger(1)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not a finite number"):
            logger.log_metric("m", value)
    with pytest.raises(ValueError, match="a name of 300 characters"):
        logger.log_metric("m" * 300, 1.0)
    values: dict[str, Any] = {"nan": math.nan, "large": 10**100, "huge": 10**5000, "text": "七", "object": object}
    for column, value in values.items():
        logger.log_extra(column, [value])
    result = CallResult([1.0], ["ok"], [None], 0.0, extras=logger.extras)
    (found,) = called(count=1).feed(framed(reply(7, result, SERVICES)))
    assert isinstance(found, CallResult)
    assert found.extras["nan"] == [None]
    assert found.extras["large"] == [str(10**100)]


def test_clean_text_controls_no_terminal() -> None:
    assert clean("a\tb\n七é\x1b]0;x\x07\x9b\u202e\ud800", 100) == "a\tb\n七é\\x1b]0;x\\x07\\x9b\\u202e\\ud800"
    assert clean("x" * 10, 3) == "xxx"


def take(messages: WorkerMessages, data: bytes) -> tuple[list[Any], str]:
    """Return what was taken, and the line by which the bytes were refused; empty if they were not."""
    try:
        return list(messages.feed(data)), ""
    except WorkerMisbehaved as error:
        return [], str(error)


def check_random_messages(seeds: range) -> int:
    """Feed random messages; return how many were taken for results. All others must be refused, with one clean line."""
    taken = 0
    for seed in seeds:
        source = random.Random(seed)
        services = source.choice([(), ("log_metric",), SERVICES])
        messages = called(services=services)
        sent = b"".join(odd_message(source, 7) for _ in range(source.choice([1, 1, 2])))
        while sent:
            size = source.choice([1, 7, 1000])
            found, line = take(messages, sent[:size])
            assert line.isprintable(), seed
            assert len(line) < 300, seed
            if line:
                break
            assert messages.is_partial or messages.state is State.IDLE or not found
            assert len(messages._buffer) <= reply_limit(2, services) + HEADER.size + size
            for result in found:
                assert isinstance(result, CallResult), seed
                taken += 1
                check_sound(result, services)
            sent = sent[size:]
    return taken


def check_sound(result: CallResult, services: tuple[str, ...]) -> None:
    assert len(result.rewards) == len(result.statuses) == len(result.traces) == 2
    for reward, status, trace in zip(result.rewards, result.statuses, result.traces, strict=True):
        assert status in ("ok", "invalid", "error")
        assert reward is None or (type(reward) is float and math.isfinite(reward) and status == "ok")
        assert (trace is None) == (status == "ok")
    assert not result.metrics or "log_metric" in services
    assert all(type(name) is str and math.isfinite(value) for name, value in result.metrics)
    assert not result.extras or "log_extra" in services
    assert all(len(values) == 2 for values in result.extras.values())


def test_random_messages_are_refused_or_sound() -> None:
    assert check_random_messages(range(1500)) > 40


@pytest.mark.slow_fault
@pytest.mark.fault(
    "200,000 random messages from reward workers", "each refused in one line, or every value of its type"
)
def test_many_random_messages_are_refused_or_sound() -> None:
    assert check_random_messages(range(10_000, 210_000)) > 5_000
