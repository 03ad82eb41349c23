"""Measure the rollout pool against simulated workers: how busy long-tailed rollouts keep them, and how dispatch scales.

    python benchmarks/rollout_scale.py                       # both tables, some five minutes
    python benchmarks/rollout_scale.py --only scale --workers 8 512

Pool, prefetching, scoring threads, weights in Ray's object store and every call through Ray are real. Simulated are the
workers, several hundred of them in a few Ray processes: a completion holds one of a worker's slots for its length times
the time of a token, and waits for a slot if all are taken, as in an engine; and the trainer, which sleeps. One in ten
completions is 20 times as long as the others; `scale` has lengths of 0.5 to 1.5 times the median, to measure dispatch alone.

`busy`: share of the time in which a worker has something to decode; `slots`: share of its slots that are taken.
`linear`: completions per second per worker, over those with the fewest workers. `driver`: processor seconds that this
process takes per second.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import ray
from transformers import AutoTokenizer

from rlqwen import GRPOConfig
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rewards import Scorer
from rlqwen.rollout import pool as pool_module
from rlqwen.rollout.actors import START_KEY, ActorHandle, ActorHandles
from rlqwen.rollout.sampler import Sampler
from rlqwen.rollout.weight_sync import LoadReport
from rlqwen.types import Prompt

NUM_GENERATIONS, NUM_HOSTS, TOKENS = 8, 2, 64


class Worker:
    """Simulate one engine: slots, a queue, and how long they were taken."""

    def __init__(self, options: dict[str, float]) -> None:
        self.slots = asyncio.Semaphore(int(options["slots"]))
        self.options = options
        self.version = self.num_running = self.num_done = 0
        self.started = self.changed = time.monotonic()
        self.busy_s = self.slot_s = 0.0
        self.finished = asyncio.Condition()

    def count(self, change: int) -> None:
        now = time.monotonic()
        self.busy_s += (now - self.changed) * (self.num_running > 0)
        self.slot_s += (now - self.changed) * self.num_running
        self.changed, self.num_running = now, self.num_running + change

    async def complete(self, seed: int) -> Any:
        rng = random.Random(seed)
        length = rng.uniform(0.5, 1.5)
        if self.options["tail"]:
            length = 20.0 if rng.random() < 0.1 else 1.0
        async with self.slots:
            self.count(1)
            await asyncio.sleep(length * self.options["median_s"])
            self.count(-1)
        async with self.finished:
            self.num_done += 1
            self.finished.notify_all()
        return [rng.randrange(256) for _ in range(TOKENS)], [-1.0] * TOKENS, "stop", None

    def usage(self) -> tuple[float, float]:
        self.count(0)
        seconds = self.changed - self.started
        return self.busy_s / seconds, self.slot_s / seconds / self.options["slots"]

    def restart_clock(self) -> None:
        self.count(0)
        self.started, self.busy_s, self.slot_s = self.changed, 0.0, 0.0


class Host:
    """Run many simulated workers in one process; their calls are those of rlqwen.rollout.worker.RolloutWorker."""

    def __init__(self, options: dict[str, float]) -> None:
        self.options = options
        self.workers: dict[int, Worker] = {}

    async def start(self, index: int) -> None:
        self.workers[index] = Worker(self.options)

    async def process(self, index: int) -> int:
        return os.getpid()

    async def sample(self, index: int, job: Any) -> Any:
        worker = self.workers[index]
        version = worker.version
        return await asyncio.gather(*map(worker.complete, job.seeds)), version, None, None

    async def progress(self, index: int, count: int) -> int:
        worker = self.workers[index]
        async with worker.finished:
            await worker.finished.wait_for(lambda: worker.num_done >= count)
        ended, worker.num_done = worker.num_done, 0
        return ended

    async def load(self, index: int, bundle: Any) -> LoadReport:
        await asyncio.sleep(self.options["sync_s"])
        self.workers[index].version = bundle.version
        return LoadReport(bundle.version, None, False, self.options["sync_s"])

    async def abort(self, index: int) -> None:
        raise NotImplementedError("nothing is dropped here")

    async def usage(self) -> list[tuple[float, float]]:
        return [worker.usage() for worker in self.workers.values()]

    async def restart_clock(self) -> None:
        for worker in self.workers.values():
            worker.restart_clock()


class Call:
    """Call a method of one worker of a host."""

    def __init__(self, method: Any, index: int) -> None:
        self._method, self._index = method, index

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._index, *arguments)


class Handle:
    """Stand for the Ray actor of one worker."""

    def __init__(self, host: Any, index: int) -> None:
        self._host, self._index = host, index

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self._host, name), self._index)


class SimulatedActors(ActorHandles):
    """Start hosts in place of a process per worker."""

    options: ClassVar[dict[str, float]] = {}
    hosts: ClassVar[list[Any]] = []

    def _spawn(self, index: int) -> ActorHandle:
        if not index:
            host: Any = ray.remote(num_cpus=0, max_concurrency=100_000)(Host)  # type: ignore[call-overload]
            SimulatedActors.hosts = [host.remote(self.options) for _ in range(NUM_HOSTS)]
        handle = Handle(self.hosts[index % NUM_HOSTS], index)
        deadline = time.monotonic() + 300
        return ActorHandle(index, handle, handle.process.remote(), handle.start.remote(), deadline, START_KEY)

    @classmethod
    def usage(cls) -> list[tuple[float, float]]:
        """Return the busy share and the share of taken slots of each worker."""
        return [usage for host in cls.hosts for usage in ray.get(host.usage.remote())]


def build_sampler(folder: Path, workers: int, slots: int, staleness: int = 0, **rollout: Any) -> Sampler:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = GRPOConfig(
        output_dir=str(folder.parent / "run"),
        num_generations=NUM_GENERATIONS,
        per_device_train_batch_size=NUM_GENERATIONS,
        max_completion_length=TOKENS,
        use_cpu=True,
        rollout={
            "engine": "vllm", "num_workers": workers, "num_cpus_per_worker": 0.001, "max_num_seqs": slots,
            "max_staleness": staleness, **rollout,
        },
    )  # fmt: skip
    policy = Policy(load_model(str(folder), args), args, device="cpu")
    scorer = Scorer([], args.scoring)
    return Sampler(policy, tokenizer, scorer, args, model_path=str(folder), longest_prompt=8, end_of_turn=None)


def prompts(count: int, start: int = 0) -> list[Prompt]:
    return [Prompt(index, [1, 2, 3], "") for index in range(start, start + count)]


def measure_busy(folder: Path, options: argparse.Namespace) -> None:
    """Print how busy workers are at max_staleness 1, with a trainer that takes `train_s` after each batch has arrived."""
    workers, slots = 8, 16
    SimulatedActors.options = {"slots": slots, "median_s": options.median_s, "tail": 1, "sync_s": 0.05}
    count = options.batch // NUM_GENERATIONS
    for name, settings in {"staleness 0": {"staleness": 0}, "staleness 1": {"staleness": 1}}.items():
        sampler = build_sampler(folder, workers, slots, **settings)
        started = time.monotonic()
        for step in range(options.steps + 2):
            if step == 2:  # the first two warm up
                ray.get([host.restart_clock.remote() for host in SimulatedActors.hosts])
                started, cpu = time.monotonic(), time.process_time()
            coming = [(str(step + 1), prompts(count))] if settings["staleness"] else []
            sampler.open(prompts(count), num_generations=NUM_GENERATIONS, draw=str(step), coming=coming)
            while sampler.take(in_order=False):
                pass
            sampler.close_opened()
            time.sleep(options.train_s)
            sampler.policy.version += 1
        busy, taken = map(statistics.fmean, zip(*SimulatedActors.usage(), strict=True))
        seconds = time.monotonic() - started
        print(
            f"| {name} | {workers} x {slots} | {busy:.2f} | {taken:.2f} | {seconds / options.steps:.1f} s | "
            f"{(time.process_time() - cpu) / seconds:.2f} s/s |",
            flush=True,
        )
        sampler.close()


def measure_scale(folder: Path, counts: Sequence[int], options: argparse.Namespace) -> None:
    """Print completions per second with more and more workers."""
    slots, first = 16, None
    SimulatedActors.options = {"slots": slots, "median_s": options.scale_s, "tail": 0, "sync_s": 0.05}
    for workers in counts:
        sampler = build_sampler(folder, workers, slots)
        sampler.sample(prompts(workers), num_generations=NUM_GENERATIONS, draw="warm")
        total = workers * options.groups
        sampler.open(prompts(total), num_generations=NUM_GENERATIONS, draw="measured")
        arrived: list[tuple[float, float]] = []
        ray.get([host.restart_clock.remote() for host in SimulatedActors.hosts])
        while groups := sampler.take(in_order=False):
            arrived += [(time.monotonic(), time.process_time())] * len(groups)
        sampler.close_opened()
        begin, end = int(0.2 * total), int(0.8 * total)
        seconds, cpu = (after - before for before, after in zip(arrived[begin], arrived[end], strict=True))
        rate = (end - begin) * NUM_GENERATIONS / seconds
        first = first or rate / workers
        print(f"| {workers} | {rate:.0f} | {rate / workers / first:.2f} | {cpu / seconds:.2f} s/s |", flush=True)
        sampler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["busy", "scale"])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--steps", type=int, default=4, help="steps of `busy`")
    parser.add_argument("--batch", type=int, default=1024, help="completions per step of `busy`")
    parser.add_argument(
        "--median-s", type=float, default=0.3, help="seconds of a completion of median length in `busy`"
    )
    parser.add_argument("--train-s", type=float, default=3.0, help="seconds that the trainer of `busy` takes per step")
    parser.add_argument("--groups", type=int, default=10, help="groups per worker in `scale`")
    parser.add_argument(
        "--scale-s", type=float, default=4.0, help="seconds of a completion of median length in `scale`"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        mock.patch.object(pool_module, "ActorHandles", SimulatedActors),
        mock.patch("rlqwen.rollout.resources._check_memory"),
    ):
        folder = build_tiny_qwen3(Path(temporary) / "model", hidden_size=64, num_layers=2, intermediate_size=128)
        if options.only != "scale":
            print("| | workers x slots | busy | slots | step | driver |\n|---|---|---|---|---|---|", flush=True)
            measure_busy(folder, options)
        if options.only != "busy":
            print("\n| workers | completions/s | linear | driver |\n|---|---|---|---|", flush=True)
            measure_scale(folder, options.workers, options)


if __name__ == "__main__":
    main()
