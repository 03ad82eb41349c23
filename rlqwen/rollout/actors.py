"""The actors of a pool: started in places that were reserved for them, described by their process, ended together."""

import time
import weakref
from dataclasses import dataclass
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.rollout import ray_cluster as cluster
from rlqwen.rollout.weight_sync import WeightBundle
from rlqwen.rollout.worker import RolloutWorker
from rlqwen.rollout.worker_protocol import EngineSettings

START_KEY, SYNC_KEY = "rollout.start_timeout", "rollout.sync_timeout"


@dataclass(eq=False)
class Slot:
    """A place in the pool and the actor that fills it."""

    index: int
    actor: Any
    process: Any
    """Reference to the actor's process id."""
    waiting: Any
    """Reference to the acknowledgement of a start or of weights; None when the worker is settled."""
    deadline: float
    deadline_key: str
    bundle: WeightBundle | None = None
    """What the worker was sent last; it serves only if that is the pool's latest. None: the model's folder."""
    num_running: int = 0
    """Completions handed to the worker and not back yet."""

    def send(self, bundle: WeightBundle | None, *, timeout_s: float) -> None:
        """Have the worker load weights, and wait for its acknowledgement."""
        self.bundle = bundle
        self.waiting = self.actor.load.remote(bundle)
        self.deadline, self.deadline_key = time.monotonic() + timeout_s, SYNC_KEY

    @property
    def pid(self) -> int | None:
        """Process id, once the worker has told it."""
        import ray

        answered, _ = ray.wait([self.process], timeout=0)
        answer = cluster.answer(self.process) if answered else None
        return answer if isinstance(answer, int) else None

    def __str__(self) -> str:
        return f"rollout worker {self.index}" + (f" (process {self.pid})" if self.pid else "")


class Slots(list[Slot]):
    """All slots of a pool, each with a bundle of the pool's placement group."""

    def __init__(self, config: RolloutConfig, settings: EngineSettings, joined: cluster.Cluster) -> None:
        """Start the actors. Raises ResourceError, with nothing left behind, if there is no place for them."""
        super().__init__()
        self._config = config
        self._settings = settings
        self._cluster = joined
        try:
            self._places = cluster.reserve(config, joined.resources)
        except BaseException:
            joined.disconnect()
            raise
        actors: list[Any] = []
        self._actors = actors
        # Also runs when the pool is forgotten, and at the interpreter's exit.
        self.end = weakref.finalize(self, _end, actors, self._places, joined.disconnect)
        """Ends all workers, and Ray if it was started for them; once."""
        for index in range(config.num_workers):
            self.append(self._spawn(index))

    def replace(self, slot: Slot) -> None:
        """Start another actor in the place of one that was killed."""
        self._actors.remove(slot.actor)
        self[slot.index] = self._spawn(slot.index)

    def last_words(self, slot: Slot) -> str:
        """What the worker's error log ends with."""
        return cluster.log_tail(self._cluster.log_folder, slot.pid)

    def _spawn(self, index: int) -> Slot:
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
        actor = actor_class.remote(self._settings)
        self._actors.append(actor)
        deadline = time.monotonic() + self._config.start_timeout
        return Slot(index, actor, actor.process.remote(), actor.start.remote(), deadline, START_KEY)


def _end(actors: list[Any], places: Any, disconnect: Any) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    # At the interpreter's exit Ray may have shut down before this.
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(places)
    disconnect()
