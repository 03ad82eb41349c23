"""Run one engine in a Ray actor, stepping without pause while groups are in flight.

The actor is asynchronous: each call submits its work to the one thread that owns the engine and awaits the answer, so
any number of groups share the engine's batch. The engine lives in the actor's own process: killing that kills it all.
torch and the engine are imported only inside the thread, after the environment that they read at import is set.
"""

import asyncio
import errno
import os
import queue
import shutil
import socket
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from rlqwen.errors import RolloutError, WorkerDied
from rlqwen.plugins.kinds import ENGINES
from rlqwen.rollout.resources import SHARED_MEMORY
from rlqwen.rollout.weight_sync import LoadReport, WeightBundle
from rlqwen.rollout.worker_protocol import Drawn, EngineSettings, GroupJob, Sampled, Share, WeightVersions

if TYPE_CHECKING:
    import numpy as np

    from rlqwen.rollout.engine import GpuWorkerEngine, InFlightWorkerEngine, WorkerEngine

T = TypeVar("T")
Answer: TypeAlias = "Future[Drawn]"


@dataclass
class _Running:
    """A group in the engine's batch."""

    future: Answer
    job: GroupJob
    completions_G: list[Sampled | None]
    versions_G: list[WeightVersions]
    """Of the completions that are there, if weights may change in flight."""


class RolloutWorker:
    """Answer the pool's calls; the pool makes a Ray actor of this class."""

    def __init__(self, settings: EngineSettings) -> None:
        self._thread = EngineThread(settings)
        self._thread.start()

    async def start(self) -> None:
        """Answer once the engine is up, with the weights of its folder."""
        await asyncio.wrap_future(self._thread.started)

    async def process(self) -> int:
        """Return the process id of this worker."""
        return os.getpid()

    async def sample(self, job: GroupJob) -> Drawn:
        """Return the completions of one group, in the order of its seeds, and what they have in common."""
        future: Answer = Future()
        self._thread.submit(lambda: self._thread.add_group(job, future), future)
        return await asyncio.wrap_future(future)

    async def progress(self, count: int) -> int:
        """Return how many completions have ended since the last call, once that are at least `count`; 0 if groups are
        dropped before."""
        future: Future[int] = Future()
        self._thread.submit(lambda: self._thread.report(count, future), future)
        return await asyncio.wrap_future(future)

    async def abort(self) -> None:
        """Drop every group in flight; their calls fail."""
        await self._call(self._thread.abort_groups)

    async def load(self, bundle: WeightBundle) -> LoadReport:
        """Load the weights and answer with the canary's gap; groups in flight are dropped, or kept if weights may change."""
        return await self._call(lambda: self._thread.load(bundle))

    async def sleep(self) -> None:
        """Free the GPU's memory until weights are loaded; every group has been answered."""
        await self._call(self._thread.sleep)

    async def transfer(self, phase: str, arguments: dict[str, Any]) -> None:
        """Run a phase of a weight transfer from GPU to GPU; the first drops or holds every group in flight."""
        await self._call(lambda: self._thread.transfer(phase, arguments))

    async def _call(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._thread.submit(lambda: future.set_result(work()), future)
        return await asyncio.wrap_future(future)


class EngineThread(threading.Thread):
    """Own the engine: no other thread touches it.

    An exception in work that was submitted fails that work alone; one in the engine's own step fails everything in
    flight and all that comes after, because the engine's state can no longer be trusted.
    """

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(name="rollout-engine", daemon=True)
        self.settings = settings
        self.started: Future[None] = Future()
        self._work: queue.SimpleQueue[tuple[Callable[[], None], Future[Any]]] = queue.SimpleQueue()
        self._running: dict[str, tuple[_Running, int]] = {}
        self._arrived: dict[Share, list[tuple[GroupJob, Answer]]] = {}
        """Groups of shares that are not complete yet."""
        self._num_requests = 0
        self._num_ended = 0
        """Completions that have ended since the last report."""
        self._reports: list[tuple[int, Future[int]]] = []
        """Reports that wait until so many have ended."""
        self._version = 0
        self._is_held = False
        """Whether groups in flight wait for new weights."""
        self._engine: WorkerEngine

    def submit(self, work: Callable[[], None], future: "Future[Any]") -> None:
        """Run `work` between two steps of the engine; an exception in it goes to `future`."""
        self._work.put((work, future))

    def run(self) -> None:
        try:
            _require_model(Path(self.settings.model_path))
            _set_environment(self.settings)
            engine = ENGINES.load(self.settings.engine)
            engine.set_environment(self.settings)
            self._engine = engine.start(self.settings)
        except BaseException as error:  # noqa: BLE001 - the caller must hear of it, whatever it is
            self.started.set_exception(_portable(error))
            return
        self.started.set_result(None)
        while True:
            try:
                self._work_off()
                self._step()
            except BaseException as error:  # noqa: BLE001 - as above
                self._fail_for_good(WorkerDied(str(_portable(error))))

    def add_group(self, job: GroupJob, future: Answer) -> None:
        """Begin a group; a group of a share waits until the whole share has arrived, and all begin in order."""
        if job.share is None:
            self._begin(job, future)
            return
        arrived = self._arrived.setdefault(job.share, [])
        arrived.append((job, future))
        if len(arrived) == job.share.size:
            del self._arrived[job.share]
            # Cached prompts of earlier rollouts would change the shapes of matrix products, and so their rounding.
            self._engine.forget_prompts()
            for one, answer in sorted(arrived, key=lambda pair: pair[0].place):
                self._begin(one, answer)

    def _begin(self, job: GroupJob, future: Answer) -> None:
        group = _Running(future, job, [None] * len(job.seeds), [[] for _ in job.seeds])
        for place in range(len(job.seeds)):
            self._num_requests += 1
            self._add(str(self._num_requests), group, place)

    def _add(self, request_id: str, group: _Running, place: int) -> None:
        self._engine.add(request_id, group.job.token_ids, group.job.seeds[place], group.job.sampling)
        self._running[request_id] = (group, place)

    def abort_groups(self) -> None:
        self._engine.abort(list(self._running))
        groups = {id(group): group for group, _ in self._running.values()}
        self._running.clear()
        waiting = [future for arrived in self._arrived.values() for _, future in arrived]
        self._arrived.clear()
        for future in [*(group.future for group in groups.values()), *waiting]:
            future.set_exception(RolloutError("the group was aborted"))
        self._num_ended = 0
        for _, report in self._reports:
            report.set_result(0)
        self._reports.clear()

    def report(self, count: int, future: "Future[int]") -> None:
        """Answer with the number of completions that have ended, once that are `count`."""
        self._reports.append((count, future))
        self._answer_reports()

    def _answer_reports(self) -> None:
        while self._reports and self._num_ended >= self._reports[0][0]:
            self._reports.pop(0)[1].set_result(self._num_ended)
            self._num_ended = 0

    def sleep(self) -> None:
        self.abort_groups()
        cast("GpuWorkerEngine", self._engine).sleep()

    def transfer(self, phase: str, arguments: dict[str, Any]) -> None:
        if phase == "start_weight_update":
            self._make_way()
        cast("GpuWorkerEngine", self._engine).transfer(phase, **arguments)

    def load(self, bundle: WeightBundle) -> LoadReport:
        self._make_way()
        report = self._engine.load(bundle)
        self._version = bundle.version
        self._is_held = False
        if report.rebuilt:  # the new engine has none of the old one's requests
            for request_id, (group, place) in list(self._running.items()):
                self._add(request_id, group, place)
        return report

    def _make_way(self) -> None:
        """Drop the groups in flight before the weights are replaced; hold them, if they may go on with others."""
        if self.settings.updates_in_flight:
            cast("InFlightWorkerEngine", self._engine).hold()
            self._is_held = True
        else:
            self.abort_groups()

    def _work_off(self) -> None:
        """Do the work that was submitted; wait for some if nothing is in flight, or must not go on."""
        while not self._work.empty() or not self._running or self._is_held:
            work, future = self._work.get()
            try:
                work()
            except Exception as error:  # noqa: BLE001 - as above
                future.set_exception(_portable(error))
            del work, future  # otherwise waiting would keep loaded weights in the object store

    def _step(self) -> None:
        for request_id, sampled in self._engine.step():
            group, place = self._running.pop(request_id)
            self._num_ended += 1
            group.completions_G[place] = sampled
            if self.settings.updates_in_flight:
                group.versions_G[place] = cast("InFlightWorkerEngine", self._engine).take_versions(request_id)
            done_G = [completion for completion in group.completions_G if completion is not None]
            if len(done_G) == len(group.completions_G):
                prompt_experts, own_G = _split_experts(done_G, len(group.job.token_ids))
                versions_G = group.versions_G if self.settings.updates_in_flight else None
                oldest = min((spans[0][0] for spans in versions_G or () if spans), default=self._version)
                group.future.set_result((own_G, oldest, prompt_experts, versions_G))
        self._answer_reports()

    def _fail_for_good(self, error: WorkerDied) -> None:
        for group, _ in self._running.values():
            if not group.future.done():
                group.future.set_exception(error)
        while True:
            _, future = self._work.get()
            future.set_exception(error)


def _split_experts(sampled_G: list[Sampled], num_prompt: int) -> tuple["np.ndarray | None", list[Sampled]]:
    """Return the prompt's experts once, as the first completion recorded them, and each completion with its own only."""
    if sampled_G[0][3] is None:
        return None, sampled_G
    own_G: list[Sampled] = []
    for token_ids, logprobs, reason, experts in sampled_G:
        own_G.append((token_ids, logprobs, reason, None if experts is None else experts[num_prompt:].copy()))
    return sampled_G[0][3][:num_prompt].copy(), own_G


def _require_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise RolloutError(
            f"{folder} holds no model on {socket.gethostname()}: a worker starts its engine from there, so on a Ray "
            "cluster of several machines model and output_dir must lie where all of them see them, under the same path"
        )


def _set_environment(settings: EngineSettings) -> None:
    """Set what torch reads from the environment at import."""
    os.environ.update(TORCH_CPP_LOG_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false")
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        # Threads that spin at a barrier for one that lost its core to another process stall the engine.
        os.environ.update(OMP_NUM_THREADS=str(settings.num_threads), OMP_WAIT_POLICY="PASSIVE")
    warnings.filterwarnings("ignore")


def _portable(error: BaseException) -> RolloutError:
    """Return an error that unpickles in the trainer's process, whatever it was here."""
    if isinstance(error, RolloutError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        folders = (SHARED_MEMORY, Path(tempfile.gettempdir()))
        free = ", ".join(f"{shutil.disk_usage(each).free / 1e9:.3g} GB in {each}" for each in folders if each.is_dir())
        return RolloutError(f"no space is left on {socket.gethostname()}: {free} are free; free some ({error})")
    return RolloutError("".join(traceback.format_exception(error)).strip())
