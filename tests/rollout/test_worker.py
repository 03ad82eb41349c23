"""Test the thread that owns an engine: when it starts its groups, and how it reports that it cannot start."""

import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlqwen.errors import RolloutError
from rlqwen.rollout.engine import WorkerEngine
from rlqwen.rollout.weight_sync import LoadReport, WeightBundle
from rlqwen.rollout.worker import EngineThread
from rlqwen.rollout.worker_protocol import GroupJob, Sampled, Share
from rlqwen.types import Sampling
from tests.patience import PATIENCE_S, wait_until


class RecordingEngine(WorkerEngine):
    """Record the calls of the thread."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def add(self, request_id: str, token_ids: list[int], seed: int, sampling: Sampling) -> None:
        self.asked.append((token_ids[0], seed))

    def forget_prompts(self) -> None:
        self.asked.append("forget")

    def abort(self, request_ids: list[str]) -> None:
        self.asked.append(f"abort {len(request_ids)}")

    def step(self) -> Iterable[tuple[str, Sampled]]:
        raise NotImplementedError

    def load(self, bundle: WeightBundle) -> LoadReport:
        return LoadReport(bundle.version, None, False, 0.0)


@pytest.fixture
def engine() -> RecordingEngine:
    return RecordingEngine()


@pytest.fixture
def thread(engine: RecordingEngine) -> EngineThread:
    """Return a thread that is not started; tests run its work themselves."""
    setup: Any = SimpleNamespace(model_path="", updates_in_flight=False)
    thread = EngineThread(setup)
    thread._engine = engine
    return thread


def job(token: int, share: Share | None = None, place: int = 0) -> GroupJob:
    return GroupJob([token], (10 * token, 10 * token + 1), Sampling(4), share, place)


def test_a_share_starts_when_it_is_complete_and_in_order(thread: EngineThread, engine: RecordingEngine) -> None:
    """Calls may arrive in any order."""
    share = Share(1, 3)
    for token, place in ((7, 2), (5, 0)):
        thread.add_group(job(token, share, place), Future())
    assert engine.asked == []
    thread.add_group(job(6, share, 1), Future())
    assert engine.asked == ["forget", (5, 50), (5, 51), (6, 60), (6, 61), (7, 70), (7, 71)]


def test_a_group_outside_a_share_starts_at_once(thread: EngineThread, engine: RecordingEngine) -> None:
    thread.add_group(job(3), Future())
    assert engine.asked == [(3, 30), (3, 31)]


@pytest.mark.fault("groups of a draw that was given up come late", "they begin with no later draw")
def test_late_groups_of_an_aborted_share_are_ignored(thread: EngineThread, engine: RecordingEngine) -> None:
    given_up: Future[Any] = Future()
    thread.add_group(job(1, Share(1, 2), 0), given_up)
    thread.abort_groups()
    with pytest.raises(RolloutError, match="aborted"):
        given_up.result(timeout=0)
    thread.add_group(job(2, Share(1, 2), 1), Future())
    thread.add_group(job(4, Share(2, 1), 0), Future())
    assert engine.asked == ["abort 0", "forget", (4, 40), (4, 41)]


def test_a_worker_reports_how_many_completions_have_ended(thread: EngineThread) -> None:
    """A long completion keeps its group from coming back, and the pool must know that there is room."""
    ended: list[tuple[str, Any]] = []
    thread._engine.step = lambda: [ended.pop(0)]  # type: ignore[method-assign]
    group: Future[Any] = Future()
    thread.add_group(job(1), group)
    thread.add_group(job(2), Future())
    first, second = Future[int](), Future[int]()
    thread.report(2, first)
    for request in ("1", "3"):
        assert not first.done()
        ended.append((request, ([5], [0.0], "stop", None)))
        thread._step()
    assert first.result(timeout=0) == 2
    assert not group.done()
    thread.report(1, second)
    assert not second.done()
    thread.abort_groups()
    assert second.result(timeout=0) == 0


@pytest.mark.fault(
    "a machine of the Ray cluster that lacks the model's folder", "refused, with folder, machine and why"
)
def test_a_machine_without_the_model_reports_an_error(tmp_path: Path) -> None:
    setup: Any = SimpleNamespace(model_path=str(tmp_path / "gone"))
    thread = EngineThread(setup)
    thread.start()
    with pytest.raises(RolloutError, match=r"gone holds no model on .*must lie where all of them see them"):
        thread.started.result(timeout=PATIENCE_S)


def test_loaded_weights_are_released(thread: EngineThread) -> None:
    """Otherwise the object store would hold two versions while the thread waits for work."""
    bundle = WeightBundle(1, (), {}, None, 0)
    alive, done = weakref.ref(bundle), Future[Any]()
    thread.submit(lambda bundle=bundle: done.set_result(thread.load(bundle)), done)  # type: ignore[misc]
    del bundle
    threading.Thread(target=thread._work_off, daemon=True).start()
    done.result(timeout=PATIENCE_S)
    wait_until(lambda: alive() is None, "the weights are let go")


class KeepingEngine(RecordingEngine):
    """An engine that keeps its requests, and may have to be built anew."""

    rebuilt = False

    def hold(self) -> None:
        self.asked.append("hold")

    def transfer(self, phase: str, **arguments: Any) -> None:
        self.asked.append(phase)

    def load(self, bundle: WeightBundle) -> LoadReport:
        return LoadReport(bundle.version, None, self.rebuilt, 0.0)

    def take_versions(self, request_id: str) -> list[tuple[int, int]]:
        return [(int(request_id), 1)]


def test_nothing_is_stepped_between_a_transfer_and_the_load_that_ends_it(thread: EngineThread) -> None:
    engine = thread._engine = KeepingEngine()
    thread.settings.updates_in_flight = True  # type: ignore[misc]
    group, loaded = Future[Any](), Future[Any]()
    engine.step = lambda: [("1", ([5], [0.0], "stop", None)), ("2", ([6], [0.0], "stop", None))]  # type: ignore[method-assign]
    thread.submit(lambda: thread.add_group(job(1), group), group)
    thread.submit(lambda: thread.transfer("start_weight_update", {}), Future())
    worker = threading.Thread(target=lambda: (thread._work_off(), thread._step()), daemon=True)  # type: ignore[func-returns-value]
    worker.start()
    wait_until(lambda: engine.asked[2:] == ["hold", "start_weight_update"], "the transfer has begun")
    assert not group.done()
    thread.submit(lambda: loaded.set_result(thread.load(WeightBundle(7, (), {}, None, 0))), loaded)
    completions, oldest, _, versions = group.result(PATIENCE_S)
    assert loaded.done()
    assert (len(completions), oldest, versions) == (2, 1, [[(1, 1)], [(2, 1)]])
    worker.join(PATIENCE_S)


def test_an_engine_that_was_built_anew_is_given_what_was_in_flight(thread: EngineThread) -> None:
    engine = thread._engine = KeepingEngine()
    thread.settings.updates_in_flight = True  # type: ignore[misc]
    thread.add_group(job(3), Future())
    thread.load(WeightBundle(1, (), {}, None, 0))
    assert engine.asked == [(3, 30), (3, 31), "hold"]
    engine.rebuilt = True
    thread.load(WeightBundle(2, (), {}, None, 0))
    assert engine.asked[3:] == ["hold", (3, 30), (3, 31)]
