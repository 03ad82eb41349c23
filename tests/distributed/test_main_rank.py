"""What the main rank does alone: the others make the same common calls in the same order, and leave when it fails."""

import contextlib
import pickle
import queue
import threading
from types import SimpleNamespace

import torch

from rlqwen.distributed import MainRank
from rlqwen.errors import ConfigError, MainRankFailed
from rlqwen.packing.batch import Branch, Tree, pack
from tests.patience import PATIENCE_S

BATCH = pack([Tree([1], [Branch([2, 3])])])


class Rank:
    """One of two ranks that are threads of this process; the main one's values go through a queue."""

    world_size = 2

    def __init__(self, rank: int, line: "queue.Queue[bytes]") -> None:
        self.rank, self.is_main, self._line = rank, rank == 0, line

    def from_main(self, value, *, patient=False):
        if self.is_main:
            self._line.put(pickle.dumps(value))
            return value
        return pickle.loads(self._line.get(timeout=PATIENCE_S))


class Recorder:
    """A policy that writes down what is asked of it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def export_weights(self):
        for name in ("a", "b", "c"):
            self.calls.append(name)
            yield name, torch.zeros(1)

    def logprobs(self, batch, **options):
        self.calls.append(f"logprobs of {batch.num_targets}")
        return "logp"

    @contextlib.contextmanager
    def inference(self):
        yield

    @contextlib.contextmanager
    def generation_model(self):
        self.calls.append("enter")
        yield "model"
        self.calls.append("leave")


def lead_two(work):
    """Run `work(policy)` on the main rank; what each rank got or raised, and the calls of each."""
    line: queue.Queue[bytes] = queue.Queue()
    policies = [Recorder(), Recorder()]
    leads = [MainRank(Rank(number, line), policy) for number, policy in enumerate(policies)]
    got: list[object] = [None, None]

    def run(number):
        try:
            got[number] = leads[number].run(lambda: work(leads[number].policy))
        except Exception as error:  # noqa: BLE001
            got[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return got, [policy.calls for policy in policies]


def test_alone_it_is_the_work_itself():
    lead = MainRank(SimpleNamespace(world_size=1), "policy")
    assert lead.policy == "policy"
    assert lead.run(lambda: 3) == 3


def test_common_calls_are_made_by_all_and_the_result_is_given_to_all():
    def work(policy):
        assert policy.logprobs(BATCH) == "logp"
        names = [name for name, _ in policy.export_weights()]
        with policy.generation_model() as model:
            names.append(model)
        return names

    got, calls = lead_two(work)
    assert got == [["a", "b", "c", "model"]] * 2
    assert calls == [["logprobs of 2", "a", "b", "c", "enter", "leave"]] * 2


def test_weights_that_nobody_reads_are_not_announced():
    got, calls = lead_two(lambda policy: str(policy.export_weights() is not None))
    assert got == ["True", "True"]
    assert calls == [[], []]


def test_a_reader_that_leaves_off_does_not_leave_the_others_behind():
    def work(policy):
        for name, _ in policy.export_weights():
            if name == "b":
                raise ConfigError("the store is full:\nmore of it")

    got, calls = lead_two(work)
    assert isinstance(got[0], ConfigError)
    assert isinstance(got[1], MainRankFailed)
    assert str(got[1]) == "rank 1 stops, because the main rank failed: ConfigError: the store is full:"
    assert got[1].exit_code == ConfigError.exit_code
    assert calls == [["a", "b", "c"]] * 2


def test_a_failure_while_generating_lets_the_others_go():
    def work(policy):
        with policy.generation_model():
            raise MemoryError("no room")

    got, calls = lead_two(work)
    assert isinstance(got[0], MemoryError)
    assert str(got[1]).endswith("MemoryError: no room")
    assert calls[1] == ["enter", "leave"]
