"""Test how the pool hands out groups, with actors that run in this process."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlqwen.config import RolloutConfig
from rlqwen.errors import WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.actors import ActorHandle
from rlqwen.rollout.dispatch import GroupDispatch
from rlqwen.types import GroupRequest, Prompt, Sampling


class Method:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def remote(self, *arguments: Any) -> object:
        self.calls.append(arguments)
        return object()


@pytest.fixture
def dispatch() -> GroupDispatch:
    """Return the dispatch of a pool of two workers that decode 8 completions at a time."""
    handles = [SimpleNamespace(sample=Method(), progress=Method(), abort=Method()) for _ in range(2)]
    actors = [ActorHandle(n, handles[n], None, None, 0.0, "") for n in range(2)]
    return GroupDispatch(RolloutConfig(num_workers=2, max_num_seqs=8), actors)


def test_room_is_known_before_a_group_with_a_long_completion_is_back(
    dispatch: GroupDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.add(GroupRequest(Prompt(i, [1], ""), (0, 1, 2, 3), Sampling(4)) for i in range(10))
    first, _ = dispatch._actors
    dispatch.hand_out(None)
    assert [actor.num_running for actor in dispatch._actors] == [12, 12]  # 1.5 times 8
    assert len(dispatch._pending) == 4
    assert first.handle.progress.calls == [(2,)]
    answers: dict[Any, Any] = {first.progress: 6}
    monkeypatch.setattr(cluster, "answer", answers.__getitem__)
    assert dispatch.progress.receive(first.progress)
    assert not dispatch.progress.receive(object())
    assert first.num_running == 6
    dispatch.hand_out(None)
    assert [actor.num_running for actor in dispatch._actors] == [10, 12]
    assert len(dispatch._pending) == 3
    reference = next(ref for ref, flight in dispatch.in_flight.items() if flight.actor is first)
    answers[reference] = "an answer"
    prompt, answer = dispatch.collect(reference)
    assert (prompt.index, answer) == (0, "an answer")
    assert first.num_running == 10  # its completions were reported before
    report = first.progress
    dispatch.drop()
    answers[report] = 4
    assert dispatch.progress.receive(report)
    assert [actor.num_running for actor in dispatch._actors] == [0, 0]


def test_groups_of_a_worker_that_dies_are_handed_out_first_and_in_order(
    dispatch: GroupDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.add(GroupRequest(Prompt(i, [1], ""), (0, 1, 2, 3), Sampling(4)) for i in range(10))
    dispatch.hand_out(None)
    first, _ = dispatch._actors
    reference = next(ref for ref, flight in dispatch.in_flight.items() if flight.actor is first)
    monkeypatch.setattr(cluster, "answer", lambda reference: WorkerDied("it died"))
    with pytest.raises(WorkerDied, match="it died"):
        dispatch.collect(reference)
    dispatch.take_back(first)
    assert [request.prompt.index for request in dispatch._pending] == [0, 2, 4, 6, 7, 8, 9]
    assert not [flight for flight in dispatch.in_flight.values() if flight.actor is first]
