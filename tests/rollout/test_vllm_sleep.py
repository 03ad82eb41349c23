"""Test the order of calls that put an engine to sleep and wake it, with an engine that checks it."""

import pytest

from rlqwen.errors import RolloutError
from rlqwen.rollout.engines.vllm_sleep import SleepCycle, reset_prefix_cache


class Engine:
    """Record calls as LLMEngine has them."""

    def __init__(self, *, empties_cache: bool = True) -> None:
        self.calls: list[str] = []
        self._empties_cache = empties_cache

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> bool:
        return self._empties_cache


def test_weights_are_awake_before_they_are_loaded_and_the_cache_after() -> None:
    engine = Engine()
    cycle = SleepCycle(engine, level=2)
    cycle.sleep()
    cycle.sleep()
    for _ in range(3):  # start, update and finish of a transfer
        cycle.wake_weights()
        engine.calls.append("load")
    cycle.wake()
    cycle.wake()
    assert engine.calls == ["sleep 2", "wake weights", "load", "load", "load", "wake kv_cache"]
    cycle.sleep()
    cycle.wake()
    assert engine.calls[-3:] == ["sleep 2", "wake weights", "wake kv_cache"]


def test_an_engine_of_level_0_never_sleeps() -> None:
    engine = Engine()
    cycle = SleepCycle(engine, level=0)
    cycle.sleep()
    cycle.wake_weights()
    cycle.wake()
    assert engine.calls == []


def test_a_prefix_cache_that_is_not_emptied_is_an_error() -> None:
    reset_prefix_cache(Engine())
    with pytest.raises(RolloutError, match="did not empty its prefix cache"):
        reset_prefix_cache(Engine(empties_cache=False))
