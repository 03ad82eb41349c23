"""Test how long a run waits for rewards that hang, and what it reports."""

import logging
import sys
import time
from collections.abc import Iterator

import cloudpickle
import pytest

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure
from rlqwen.rewards import wait_budget
from rlqwen.rewards.call_counts import CallCounts
from rlqwen.rewards.wait_budget import WaitBudget
from tests.rewards.test_scorer import loop_in_python, make_group, score_letters, scoring


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    for name in ("tests.rewards.test_scorer", __name__):
        cloudpickle.register_pickle_by_value(sys.modules[name])
    yield
    for name in ("tests.rewards.test_scorer", __name__):
        cloudpickle.unregister_pickle_by_value(sys.modules[name])


class Clock:
    """Replace the `time` module of rlqwen.rewards.wait_budget."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(wait_budget, "time", clock)
    return clock


def test_a_hanging_reward_warns_and_then_stops_the_run(caplog: pytest.LogCaptureFixture) -> None:
    letters = score_letters(loop_in_python)
    sign = r"'letters' hangs.*scoring\.timeout=0\.3,.*max_wait_seconds=0\.8"
    with scoring(letters, timeout=0.3, max_wait_share=0.01, max_wait_seconds=0.8) as scorer:
        scorer.wait_until_ready()
        with pytest.raises(RewardFailure, match=sign):
            scorer.score([make_group("good"), make_group(*["bad"] * 40)])
    lines = [record.getMessage() for record in caplog.records if "hangs" in record.getMessage()]
    assert len(lines) == 1
    assert "reward 'letters' hangs" in lines[0]
    assert "lower scoring.timeout" in lines[0]


def test_a_slow_reward_does_not_hang_and_its_wait_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    def slow(completions: list[str]) -> list[float]:
        time.sleep(0.4)
        return [1.0] * len(completions)

    def quick(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    def here(completions: list[str]) -> list[float]:
        time.sleep(0.1)
        return [1.0] * len(completions)

    with scoring(slow, quick, here, timeout=60, max_wait_seconds=0.1, in_process=["here"]) as scorer:
        scorer.wait_until_ready()
        scorer.score([make_group("a"), make_group("b")])
        metrics = scorer.metrics()
    assert metrics["reward/slow/wait_seconds"] > 0.1  # 0.8 minus the time before the wait
    assert metrics["reward/here/wait_seconds"] >= 0.2
    assert (
        metrics["reward/quick/wait_seconds"] < metrics["reward/slow/wait_seconds"]
    )  # its calls were queued, not running
    assert not [record for record in caplog.records if "hangs" in record.getMessage()]


def test_time_lost_adds_up_until_a_step_is_within_the_share(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    budget = WaitBudget(ScoringConfig(max_wait_share=0.5, max_wait_seconds=100))

    def step(seconds: float, waited: float) -> None:
        clock.now += seconds
        budget.check({"judge": waited})
        budget.end_step({"judge": waited})

    step(100, 50)
    assert not caplog.records
    step(100, 60)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "60 s of the 100 s of this step" in caplog.text
    step(100, 40)
    step(100, 90)
    with pytest.raises(RewardFailure, match="waited 150 s"):
        step(100, 60)
    assert len(caplog.records) == 1
    patient = WaitBudget(ScoringConfig(max_wait_share=1))
    clock.now += 10_000
    patient.check({"judge": 10_000.0})


def test_seconds_waited_are_saved_and_are_zero_if_the_state_has_none() -> None:
    counts, restored, without = CallCounts(), CallCounts(), CallCounts()
    counts.waited["judge"] += 3
    restored.load_state_dict(counts.state_dict())
    assert restored.waited == {"judge": 3}
    state = counts.state_dict()
    del state["waited"]
    without.load_state_dict(state)
    assert not without.waited
