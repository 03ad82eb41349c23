"""Start the Ray actors of a pool in reserved places, describe them by their process, and end them together."""

import contextlib
import time
import weakref
from dataclasses import dataclass
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.errors import DeadlineExceeded, RolloutError, WorkerDied
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.weight_sync import WeightBundle
from rlqwen.rollout.worker import RolloutWorker
from rlqwen.rollout.worker_protocol import EngineSettings
from rlqwen.types import GroupRequest

START_KEY, SYNC_KEY = "rollout.start_timeout", "rollout.sync_timeout"


@dataclass(eq=False)
class ActorHandle:
    """A place in the pool, and the Ray actor that fills it."""

    index: int
    handle: Any
    """Ray's handle of the actor."""
    process: Any
    """Reference to the actor's process id."""
    waiting: Any
    """Reference to the acknowledgement of a start or of weights; None while the worker waits for nothing."""
    deadline: float
    deadline_key: str
    bundle: WeightBundle | None = None
    """The weights that the worker was sent last; it serves only if they are the pool's latest. None: the model's folder."""
    num_handed: int = 0
    """Completions handed to the worker since its groups were last dropped."""
    num_returned: int = 0
    """Completions of groups that are back."""
    num_reported: int = 0
    """Completions that the worker has reported as ended, their groups perhaps not."""
    progress: Any = None
    """Reference to the worker's next report; None: none was asked for."""

    @property
    def num_running(self) -> int:
        """Return the completions that the worker has not ended yet, as far as is known."""
        return self.num_handed - max(self.num_returned, self.num_reported)

    def forget_groups(self) -> None:
        """Forget the groups that the worker was handed."""
        self.num_handed = self.num_returned = self.num_reported = 0

    def send(self, bundle: WeightBundle | None, *, timeout_s: float) -> None:
        """Make the worker load weights, and expect its acknowledgement within `timeout_s`."""
        self.bundle = bundle
        self.waiting = self.handle.load.remote(bundle)
        self.deadline, self.deadline_key = time.monotonic() + timeout_s, SYNC_KEY

    def sleep(self, *, timeout_s: float) -> None:
        """Make the worker free its GPU's memory, and expect its acknowledgement within `timeout_s`."""
        self.waiting = self.handle.sleep.remote()
        self.deadline, self.deadline_key = time.monotonic() + timeout_s, SYNC_KEY

    @property
    def pid(self) -> int | None:
        """Process id; None until the worker has reported it."""
        answered = cluster.wait([self.process], timeout_s=0)
        answer = cluster.answer(self.process) if answered else None
        return answer if isinstance(answer, int) else None

    def __str__(self) -> str:
        return f"rollout worker {self.index}" + (f" (process {self.pid})" if self.pid else "")


@dataclass
class InFlightRequest:
    """A group that a worker is sampling."""

    actor: ActorHandle
    request: GroupRequest
    deadline: float


class ActorHandles(list[ActorHandle]):
    """All actors of a pool, each with a bundle of the pool's placement group."""

    def __init__(self, config: RolloutConfig, settings: EngineSettings, joined: cluster.Cluster) -> None:
        """Start the actors; raise ResourceError, with nothing left behind, if there is no place for them."""
        super().__init__()
        self.num_restarts = 0
        self._config = config
        self._settings = settings
        self._cluster = joined
        try:
            self._places = cluster.reserve(config, joined.resources)
        except BaseException:
            joined.disconnect()
            raise
        actors: list[Any] = []
        self._ray_actors = actors
        # Also runs when the pool is garbage collected, and at the interpreter's exit.
        self.end = weakref.finalize(self, _end, actors, self._places, joined.disconnect)
        """End all workers, and Ray if it was started for them; does nothing the second time."""
        for index in range(config.worker_count):
            self.append(self._spawn(index))

    def replace(self, actor: ActorHandle, error: Exception) -> None:
        """Kill an actor that failed with `error`, and start another in its place.

        Raises WorkerDied or DeadlineExceeded, as `error` is, at more failures than `rollout.max_restarts`.
        """
        import ray

        stderr_tail = f"{actor}: {error}{cluster.log_tail(self._cluster.log_folder, actor.pid)}"
        cluster.call(ray.kill, actor.handle)
        self.num_restarts += 1
        if self.num_restarts > self._config.max_restarts:
            kind = type(error) if isinstance(error, DeadlineExceeded) else WorkerDied
            raise kind(
                f"rollout workers failed {self.num_restarts} times, and rollout.max_restarts is "
                f"{self._config.max_restarts}. The last: {stderr_tail}"
            )
        self._ray_actors.remove(actor.handle)
        self[actor.index] = self._spawn(actor.index)

    def _spawn(self, index: int) -> ActorHandle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = self._cluster.resources
        actor_class: Any = ray.remote(
            num_cpus=wanted.num_cpus,
            num_gpus=wanted.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._places, placement_group_bundle_index=index),
        )(RolloutWorker)
        handle = cluster.call(actor_class.remote, self._settings)
        self._ray_actors.append(handle)
        deadline = time.monotonic() + self._config.start_timeout
        return ActorHandle(index, handle, handle.process.remote(), handle.start.remote(), deadline, START_KEY)


def _end(actors: list[Any], places: Any, disconnect: Any) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    # At the interpreter's exit Ray may have shut down before this.
    if ray.is_initialized() and not cluster.is_lost():
        with contextlib.suppress(RolloutError):
            for actor in actors:
                cluster.call(ray.kill, actor)
            cluster.call(remove_placement_group, places)
    disconnect()
