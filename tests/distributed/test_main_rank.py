"""Test work on the main rank: other ranks make the same collective calls in the same order, and stop if it fails."""

import contextlib
import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from rlqwen.distributed import MainRank, on_all_ranks, on_this_rank
from rlqwen.distributed.ranks import Ranks
from rlqwen.errors import ConfigError, MainRankFailed
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from tests.patience import PATIENCE_S

T = TypeVar("T")

BATCH = pack([Tree([1], [Branch([2, 3])])])


class Rank(Ranks):
    """Stand in for one of two ranks, each a thread of this process; values of the main rank go through a queue."""

    def __init__(self, rank: int, values: "queue.Queue[bytes]") -> None:
        self.world_size, self.rank, self._values = 2, rank, values

    def from_main(self, value: T, *, patient: bool = False) -> T:
        if self.is_main:
            self._values.put(pickle.dumps(value))
            return value
        sent: T = pickle.loads(self._values.get(timeout=PATIENCE_S))
        return sent


class Recorder:
    """Stand in for a policy, and record the calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.model = torch.nn.Linear(1, 1)

    def undeclared(self) -> None:
        self.calls.append("undeclared")

    @on_all_ranks("stream")
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b", "c"):
            self.calls.append(name)
            yield name, torch.zeros(1)

    @on_all_ranks("forward")
    def logprobs(self, batch: PackedBatch, **options: Any) -> str:
        self.calls.append(f"logprobs of {batch.num_targets}")
        return "logp"

    @on_this_rank
    @contextlib.contextmanager
    def inference(self) -> Iterator[Any]:
        yield

    @on_all_ranks("context")
    @contextlib.contextmanager
    def generation_model(self) -> Iterator[str]:
        self.calls.append("enter")
        yield "model"
        self.calls.append("leave")


def run_on_both(work: Callable[..., Any]) -> Any:
    """Run `work(policy)` on the main rank; return the result or error of each rank, and the calls of each."""
    values: queue.Queue[bytes] = queue.Queue()
    policies = [Recorder(), Recorder()]
    main_ranks = [MainRank(Rank(number, values), policy) for number, policy in enumerate(policies)]
    main_ranks[1].help_send = lambda task, stream: policies[1].calls.extend(
        [task, *(f"help {name}" for name, _ in stream)]
    )
    results: list[object] = [None, None]

    def run(number: int) -> None:
        try:
            results[number] = main_ranks[number].run(lambda: work(main_ranks[number].policy))
        except Exception as error:  # noqa: BLE001
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results, [policy.calls for policy in policies]


def test_on_one_rank_the_work_simply_runs() -> None:
    main_rank = MainRank(Ranks(), "policy")
    assert main_rank.policy == "policy"
    assert main_rank.run(lambda: 3) == 3


def test_all_ranks_make_the_collective_calls_and_get_the_result() -> None:
    def work(policy: Recorder) -> Any:
        assert policy.logprobs(BATCH) == "logp"
        names = [name for name, _ in policy.export_weights()]
        with policy.generation_model() as model:
            names.append(model)
        return names

    results, calls = run_on_both(work)
    assert results == [["a", "b", "c", "model"]] * 2
    assert calls == [["logprobs of 2", "a", "b", "c", "enter", "leave"]] * 2


def test_an_export_that_is_never_read_makes_no_collective_call() -> None:
    results, calls = run_on_both(lambda policy: str(policy.export_weights() is not None))
    assert results == ["True", "True"]
    assert calls == [[], []]


@pytest.mark.parametrize("name", ["undeclared", "model"])
def test_a_call_that_may_need_the_other_ranks_and_does_not_say_so_is_refused(name: str) -> None:
    results, calls = run_on_both(lambda policy: getattr(policy, name)())
    assert isinstance(results[0], RuntimeError)
    assert str(results[0]).startswith(f"Recorder.{name} is used by the main rank alone, and does not declare")
    assert isinstance(results[1], MainRankFailed)
    assert calls == [[], []]


def test_each_rank_sends_its_own_weights() -> None:
    def work(policy: Any) -> str:
        sent: list[str] = []
        policy.send_by_all_ranks("task", lambda stream: sent.extend(name for name, _ in stream))
        policy.logprobs(BATCH)
        return "".join(sent)

    results, calls = run_on_both(work)
    assert results == ["abc", "abc"]
    assert calls[0] == ["a", "b", "c", "logprobs of 2"]
    assert calls[1] == ["a", "b", "c", "task", "help a", "help b", "help c", "logprobs of 2"]


def test_a_failure_during_an_export_ends_the_other_ranks() -> None:
    def work(policy: Policy) -> None:
        for name, _ in policy.export_weights():
            if name == "b":
                raise ConfigError("the store is full:\nmore details")

    results, calls = run_on_both(work)
    assert isinstance(results[0], ConfigError)
    assert isinstance(results[1], MainRankFailed)
    assert str(results[1]) == "rank 1 stops, because the main rank failed: ConfigError: the store is full:"
    assert results[1].exit_code == ConfigError.exit_code
    assert calls == [["a", "b", "c"]] * 2


def test_a_failure_during_generation_ends_the_other_ranks() -> None:
    def work(policy: Policy) -> None:
        with policy.generation_model():
            raise MemoryError("no room")

    results, calls = run_on_both(work)
    assert isinstance(results[0], MemoryError)
    assert str(results[1]).endswith("MemoryError: no room")
    assert calls[1] == ["enter", "leave"]
