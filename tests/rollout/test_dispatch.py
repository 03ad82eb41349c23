"""Test how the pool hands out groups, with actors that run in this process."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from rlqwen.config import RolloutConfig
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import ActorHandle
from rlqwen.rollout.pool import RolloutPool
from rlqwen.rollout.progress_reports import ProgressReports
from rlqwen.types import Group, GroupRequest, Prompt, Sampling


class Method:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def remote(self, *arguments: Any) -> object:
        self.calls.append(arguments)
        return object()


@pytest.fixture
def pool() -> RolloutPool:
    """Return a pool of two workers that decode 8 completions at a time."""
    pool = RolloutPool.__new__(RolloutPool)
    pool.config = RolloutConfig(num_workers=2, max_num_seqs=8)
    pool._bundle, pool._in_flight, pool._progress, pool._pending = None, {}, ProgressReports(), deque()
    handles = [SimpleNamespace(sample=Method(), progress=Method(), abort=Method()) for _ in range(2)]
    pool._actors = [ActorHandle(n, handles[n], None, None, 0.0, "") for n in range(2)]  # type: ignore[assignment]
    return pool


def test_room_is_known_before_a_group_with_a_long_completion_is_back(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = pool._pending
    pending.extend(GroupRequest(Prompt(i, [1], ""), (0, 1, 2, 3), Sampling(4)) for i in range(10))
    first, _ = pool._actors
    pool._hand_out()
    assert [actor.num_running for actor in pool._actors] == [12, 12]  # 1.5 times 8
    assert len(pending) == 4
    assert first.handle.progress.calls == [(2,)]
    answers = {first.progress: 6}
    monkeypatch.setattr(cluster, "answer", answers.__getitem__)
    assert pool._progress.receive(first.progress)
    assert not pool._progress.receive(object())
    assert first.num_running == 6
    pool._hand_out()
    assert [actor.num_running for actor in pool._actors] == [10, 12]
    assert len(pending) == 3
    reference = next(ref for ref, flight in pool._in_flight.items() if flight.actor is first)
    answers[reference] = ([[[5], [0.0], "stop", None]] * 4, 1, None, None)  # type: ignore[assignment]
    pool._reader = SimpleNamespace(group=lambda prompt, drawn: Group(prompt, [], 1))  # type: ignore[assignment]
    pool._collect(reference)
    assert first.num_running == 10  # its completions were reported before
    report = first.progress
    pool._drop_in_flight()
    answers[report] = 4
    assert pool._progress.receive(report)
    assert [actor.num_running for actor in pool._actors] == [0, 0]
