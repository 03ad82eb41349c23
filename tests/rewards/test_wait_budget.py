"""Test how long a run waits for rewards that hang, and what it reports."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import cloudpickle
import pytest

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure
from rlqwen.rewards import Scorer, build_rewards, wait_budget
from rlqwen.rewards.call_counts import CallCounts
from rlqwen.rewards.hang_search import HangSearch, group_timeout
from rlqwen.rewards.reward_call import CallResult
from rlqwen.rewards.scoring_batch import ScoringBatch, ScoringJob
from rlqwen.rewards.wait_budget import WaitBudget
from rlqwen.types import Group
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


def crash_or_hang(completions: list[str]) -> list[float]:
    """Do per completion what it says."""
    for text in completions:
        if text.startswith("hang"):
            loop_in_python(text)
        if text.startswith("crash"):
            os._exit(9)
    return [1.0] * len(completions)


def five_percent_each(num_groups: int) -> list[Group]:
    """Return groups of 8 of which 5% hang, at least two of them in one group, and 5% crash."""
    texts = [f"good {index}" for index in range(num_groups * 8)]
    count = len(texts) // 20
    for index in range(count):
        texts[0 if index == 0 else 1 if index == 1 else index * 20] = f"hang {index}"
        texts[index * 20 + 7] = f"crash {index}"
    return [make_group(*texts[start : start + 8]) for start in range(0, len(texts), 8)]


def check_loss(timeout: float, num_groups: int, caplog: pytest.LogCaptureFixture, config: ScoringConfig) -> None:
    groups = five_percent_each(num_groups)
    with Scorer(build_rewards([crash_or_hang]), config) as scorer:
        scorer.wait_until_ready()
        scorer.score(groups)
        metrics = scorer.metrics()
    count = num_groups * 8 // 20
    assert metrics["reward/crash_or_hang/timeout"] == metrics["reward/crash_or_hang/error"] == count
    expected = {"hang": ("timeout", None), "crash": ("error", None), "good": ("ok", 1.0)}
    for group in groups:
        for index, completion in enumerate(group.completions):
            found = group.call_statuses["crash_or_hang"][index], group.rewards["crash_or_hang"][index]
            assert found == expected[completion.text.split()[0]], completion.text
    stacks = 0.3 * (2 * count + count)  # the time that a worker is given to write the stack of a call that is ended
    assert metrics["reward/crash_or_hang/seconds"] < count * timeout + stacks + 1.0
    lines = [record.getMessage() for record in caplog.records if "hung on" in record.getMessage()]
    assert len(lines) == 1
    assert f"'crash_or_hang' hung on {count} of {num_groups * 8} samples" in lines[0]


@pytest.mark.fault(
    "5% of the samples hang in their reward and 5% crash it",
    "each hanging one costs at most one timeout, and a line says so",
)
def test_hanging_samples_cost_one_timeout_each(caplog: pytest.LogCaptureFixture) -> None:
    """All settings but the timeout are the default."""
    check_loss(2.0, 8, caplog, ScoringConfig(timeout=2.0))


@pytest.mark.slow_fault
@pytest.mark.fault(
    "the same with the default settings: 10 groups of 8, of which 4 samples hang and 4 crash", "at most 120 s are lost"
)
def test_hanging_samples_cost_one_timeout_each_with_the_default_settings(caplog: pytest.LogCaptureFixture) -> None:
    check_loss(30.0, 10, caplog, ScoringConfig())


@pytest.mark.parametrize(("num_hanging", "count"), [(1, 8), (2, 8), (8, 8), (1, 2), (64, 64)])
def test_a_search_for_hanging_samples_takes_their_timeouts_and_no_more(num_hanging: int, count: int) -> None:
    batch, timeout = ScoringBatch(SimpleNamespace()), 30.0
    job = ScoringJob(batch, 0, make_group(*["x"] * count), range(count))
    search = HangSearch(timeout, count)
    first = search.first_round(job)
    spent = group_timeout(timeout, count) + sum(one.seconds or 0.0 for one in first[:num_hanging])
    search.unfinished = [(one, CallResult.failed("timeout", "", 1, 0.0)) for one in first[:num_hanging]]
    if num_hanging > 1:
        spent += sum(one.seconds or 0.0 for one in search.second_round())
    assert spent == pytest.approx(num_hanging * timeout)


def test_slow_samples_beside_a_hanging_one_keep_their_rewards() -> None:
    def slow(completions: list[str]) -> list[float]:
        for text in completions:
            if text == "hang":
                loop_in_python(text)
            time.sleep({"slow": 1.0}.get(text, 0.0))
        return [1.0] * len(completions)

    group = make_group("hang", "slow", "good", "good")
    with scoring(
        slow, timeout=6.0
    ) as scorer:  # 4.8 s for the group, 1.2 s for each alone, then 2.4 s for the slow ones
        scorer.wait_until_ready()
        scorer.score([group])
    assert group.call_statuses["slow"] == ["timeout", "ok", "ok", "ok"]
