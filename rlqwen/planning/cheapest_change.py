"""Find the cheapest change that lets a run fit: of its settings, its layout, its GPUs, or of what it trains."""

from collections.abc import Iterator
from dataclasses import dataclass

from rlqwen.config import LoraSettings, OnlineConfig, QuantizationSettings, Recipe
from rlqwen.planning.gpus import MOST_GPUS, NODE, Cluster
from rlqwen.planning.layout_search import find_best
from rlqwen.planning.run_plan import RunPlan, RunPlanner
from rlqwen.preflight.parallel_layout import ParallelLayout

_LORA = {"r": 16}


@dataclass(frozen=True)
class Change:
    """A change, and the plan with it."""

    words: str
    plan: RunPlan

    @property
    def cost(self) -> float:
        """Return the GPU-seconds per token."""
        return self.plan.cluster.count / self.plan.tokens_per_second


def cheapest_change(planner: RunPlanner, plan: RunPlan) -> Change | None:
    """Return the change that fits at the fewest GPU-seconds per token; None if nothing fits.

    What this version runs on the same GPUs comes first, then other layouts of them; then host memory or more GPUs; and an
    adapter, which is another training, where nothing else fits.
    """
    for tried in (_same_gpus, _other_layouts, _more_memory, _adapters):
        found = [change for change in tried(planner, plan) if change.plan.fits]
        if found:
            return min(found, key=lambda change: change.cost)
    return None


def setting_words(before: RunPlan, after: RunPlan) -> str:
    """Return the options and keys that lead from one plan to another on the same GPUs."""
    words = [] if str(before.layout) == str(after.layout) else [after.layout.keys]
    train, changed = before.recipe.train, after.recipe.train
    for key in ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps"):
        old, new = getattr(train, key), getattr(changed, key)
        if old != new and not (key == "gradient_checkpointing" and old is None and new):
            words.append(f"train.{key}={str(new).lower()}")
    if isinstance(train, OnlineConfig) and isinstance(changed, OnlineConfig):
        ranks = changed.rollout.tensor_parallel_size
        if train.rollout.tensor_parallel_size != ranks:
            words.append(f"rollout.tensor_parallel_size={ranks}")
    return " ".join(words)


def _same_gpus(planner: RunPlanner, plan: RunPlan) -> Iterator[Change]:
    """Yield recomputation, smaller micro-batches, and the best layout that this version runs."""
    for recipe in (_recomputing(planner.recipe), _single(planner.recipe)):
        changed = planner.plan(plan.layout, recipe)
        yield Change(setting_words(plan, changed), changed)
    if (best := find_best(planner, runnable=True)) is not None:
        yield Change(setting_words(plan, best), best)


def _other_layouts(planner: RunPlanner, plan: RunPlan) -> Iterator[Change]:
    if (best := find_best(planner)) is not None:
        yield Change(setting_words(plan, best), best)


def _more_memory(planner: RunPlanner, plan: RunPlan) -> Iterator[Change]:
    """Yield the optimizer in host memory, and more GPUs."""
    offloading = [ParallelLayout(engine="deepspeed", fsdp=planner.train_gpus, zero_stage=stage) for stage in (1, 2, 3)]
    for layout in offloading:
        changed = planner.plan(layout.with_sizes(offload_optimizer=True), _single(planner.recipe))
        yield Change(setting_words(plan, changed), changed)
    yield from _more_gpus(planner)


def _recomputing(recipe: Recipe, **changes: object) -> Recipe:
    train = recipe.train.model_copy(update={"gradient_checkpointing": True} | changes)
    return recipe.model_copy(update={"train": train})


def _single(recipe: Recipe) -> Recipe:
    return _recomputing(recipe, per_device_train_batch_size=1)


def _more_gpus(planner: RunPlanner) -> Iterator[Change]:
    """Yield the best plan on the fewest GPUs of the same kind, of those that this version runs if any fits."""
    for runnable in (True, False):
        for cluster in _larger(planner.cluster):
            best = find_best(planner.on(cluster), runnable=runnable)
            if best is not None:
                yield Change(f"--gpus {cluster} {best.layout.keys}", best)
                return


def _larger(cluster: Cluster) -> Iterator[Cluster]:
    count = cluster.count
    while count < MOST_GPUS:
        count = count * 2 if count < NODE else count + NODE if count < 4 * NODE else count * 2
        yield Cluster(cluster.gpu, min(count, MOST_GPUS))


def _adapters(planner: RunPlanner, plan: RunPlan) -> Iterator[Change]:
    """Yield an adapter on weights in bfloat16, and on weights of 4 bits."""
    for words, quantization in (
        (f"model.lora='{{r: {_LORA['r']}}}'", None),
        (f"model.lora='{{r: {_LORA['r']}}}' model.quantization='{{bits: 4}}'", QuantizationSettings(bits=4)),
    ):
        changed = _adapted(planner.recipe, quantization)
        if changed is None:
            continue
        layout = plan.layout.with_sizes(fsdp=planner.train_gpus, tp=1, ep=1, pp=1)
        adapted = planner.with_model(changed, planner.size.with_lora(changed))
        yield Change(words, adapted.plan(layout))


def _adapted(recipe: Recipe, quantization: QuantizationSettings | None) -> Recipe | None:
    """Return the recipe with an adapter, and quantized weights; None if it has them."""
    if recipe.model.lora is not None and quantization is None:
        return None
    update = {"lora": recipe.model.lora or LoraSettings(**_LORA), "dtype": "bfloat16", "quantization": quantization}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
