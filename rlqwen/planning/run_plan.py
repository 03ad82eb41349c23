"""Put memory and time of one layout together, and find the layout that is fastest."""

import math
from dataclasses import dataclass, replace

from rlqwen.config import OnlineConfig, Recipe
from rlqwen.planning.gpus import Cluster
from rlqwen.planning.rollout_time import Engines, engines_of, rollout_time, sync_time
from rlqwen.planning.step_time import Efficiency, Run, UpdateTime, update_time
from rlqwen.planning.workload import Workload
from rlqwen.preflight.memory_fit import fits
from rlqwen.preflight.memory_plan import SYNC, MemoryPlan
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parallel_layout import ParallelLayout
from rlqwen.rollout.engine import engine_class


@dataclass(frozen=True)
class RunPlan:
    """Memory and time of a run with one layout."""

    layout: ParallelLayout
    recipe: Recipe
    cluster: Cluster
    work: Workload
    memory: MemoryPlan
    update: UpdateTime
    micro_batches: int
    rollout: UpdateTime | None = None
    sync: float = 0.0
    engines: Engines | None = None
    overlaps: bool = False
    """Whether completions are sampled while the policy trains, on GPUs of their own."""

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.cluster.gpu.memory)

    def total(self, phase: str) -> float:
        """Return the bytes of a phase on one GPU, those of a rollout engine included."""
        return self.memory.total(phase) + self.memory.engine_memory(self.cluster.gpu.memory).get(phase, 0.0)

    @property
    def peak_phase(self) -> str:
        return max(self.memory.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Return the largest total of any phase, in bytes."""
        return self.total(self.peak_phase)

    @property
    def train_seconds(self) -> float:
        """Return the seconds of training in a step."""
        return self.work.updates_per_step * self.update.total

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step: sampling, sending weights and training, one after the other unless they overlap."""
        rollout = self.rollout.total if self.rollout else 0.0
        working = max(rollout, self.train_seconds) if self.overlaps else rollout + self.train_seconds
        return working + self.sync

    @property
    def rollout_share(self) -> float:
        """Return the share of a step's time in which completions are sampled."""
        return self.rollout.total / (self.step_seconds or math.inf) if self.rollout else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the packed tokens that are trained on per second, on all GPUs together."""
        return self.work.updates_per_step * self.work.tokens / self.step_seconds

    @property
    def gpu_hours(self) -> float | None:
        """Return the GPU-hours of the run; None if the number of its steps is unknown."""
        if self.work.num_steps is None:
            return None
        return self.work.num_steps * self.step_seconds * self.cluster.count / 3600


class RunPlanner:
    """Plan one recipe on one cluster with any layout."""

    def __init__(
        self,
        recipe: Recipe,
        size: ModelSize,
        cluster: Cluster,
        work: Workload,
        *,
        longest: int | None = None,
        efficiency: Efficiency | None = None,
    ) -> None:
        """Take what all layouts have in common; `longest`: tokens of the longest row, None: what the config allows."""
        self.recipe, self.size, self.cluster, self.work, self.longest = recipe, size, cluster, work, longest
        self.efficiency = efficiency or Efficiency()
        self.train_gpus = self.train_ranks(recipe, cluster)
        self.rollout_gpus = cluster.count - self.train_gpus
        """GPUs that only sample."""
        self._engine = engine_class(recipe.train.rollout) if isinstance(recipe.train, OnlineConfig) else None
        self._runs: dict[bool, Run] = {}

    @staticmethod
    def train_ranks(recipe: Recipe, cluster: Cluster) -> int:
        """Return the GPUs that train: all, or half of them where engines have GPUs of their own."""
        train = recipe.train
        is_separate = isinstance(train, OnlineConfig) and train.rollout.placement == "separate"
        return max(1, cluster.count // 2) if is_separate else cluster.count

    def plan(self, layout: ParallelLayout, recipe: Recipe | None = None) -> RunPlan:
        """Return the plan of a layout; `recipe`: one with other settings of the same model."""
        recipe = self._for_layout(recipe or self.recipe, layout)
        train = recipe.train
        memory = plan_memory(recipe, self.size, longest=self.longest, layout=layout, engine=self._engine)
        run = self._run(recomputes=train.gradient_checkpointing is not False)
        most = memory.micro_batch.tokens
        update = update_time(run, layout, most)
        plan = RunPlan(layout, recipe, self.cluster, self.work, memory, update, self.work.micro_batches(layout, most))
        if not isinstance(train, OnlineConfig):
            return plan
        engines = engines_of(run, train, self.rollout_gpus or self.cluster.count)
        return replace(
            plan,
            rollout=rollout_time(run, engines),
            sync=sync_time(run, engines, is_adapter=self.size.adapters is not None),
            engines=engines,
            overlaps=bool(self.rollout_gpus and train.rollout.max_staleness),
        )

    def sampling(self, recipe: Recipe) -> tuple[float, float]:
        """Return the seconds of sampling one step's completions, and the least bytes of an engine's GPU."""
        train = recipe.train
        assert isinstance(train, OnlineConfig)
        run = self._run(recomputes=True)
        engines = engines_of(run, train, self.rollout_gpus or self.cluster.count)
        layout = ParallelLayout(fsdp=self.train_gpus)
        memory = plan_memory(recipe, self.size, longest=self.longest, layout=layout, engine=self._engine)
        return rollout_time(run, engines).total, memory.engine_bytes + memory.total(SYNC)

    def _run(self, *, recomputes: bool) -> Run:
        if recomputes not in self._runs:
            self._runs[recomputes] = Run(self.size, self.cluster, self.work, recomputes, self.efficiency)
        return self._runs[recomputes]

    def on(self, cluster: Cluster) -> "RunPlanner":
        """Return the planner of the same updates on other GPUs."""
        return RunPlanner(self.recipe, self.size, cluster, self.work, longest=self.longest, efficiency=self.efficiency)

    def with_model(self, recipe: Recipe, size: ModelSize) -> "RunPlanner":
        """Return the planner of a recipe that trains another part of the model."""
        return RunPlanner(recipe, size, self.cluster, self.work, longest=self.longest, efficiency=self.efficiency)

    def _for_layout(self, recipe: Recipe, layout: ParallelLayout) -> Recipe:
        """Return the recipe with the micro-batches that a data rank makes of its share of the update."""
        sequences = -(-self.work.sequences // layout.data_ranks)
        size = min(recipe.train.per_device_train_batch_size, sequences)
        train = recipe.train.model_copy(
            update={"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-sequences // size)}
        )
        return recipe.model_copy(update={"train": train})
