"""Find the layout with which a run takes the least time on the GPUs that it has."""

from collections.abc import Iterator
from typing import Any

from rlqwen.config import OnlineConfig, Recipe
from rlqwen.planning.gpus import NODE
from rlqwen.planning.run_plan import RunPlan, RunPlanner
from rlqwen.preflight.memory_plan import USABLE
from rlqwen.preflight.parallel_layout import ParallelLayout
from rlqwen.preflight.parameter_counts import chosen_experts

_MICRO_BATCHES = (1, 2, 4, 8)
"""Sequences per micro-batch that are tried, besides the recipe's own."""
NEARLY = 1.05
"""Plans that take so many times as long as the fastest count as equal: the estimate is not more exact than that."""
_WEIGHTS = {"ep": 1, "sp": 2, "tp": 4, "pp": 8}
"""How much a kind of group adds to a layout's complexity: more than all kinds before it."""


def layouts(planner: RunPlanner, *, runnable: bool = False) -> list[ParallelLayout]:
    """Return the FSDP2 layouts that divide model, GPUs and batch.

    Tensor, sequence and expert parallel groups stay inside a node. With an adapter there are only FSDP2 and sequence
    parallel ranks. Each rank has rows, and a pipeline as many micro-batches as stages, where any layout allows that.
    `runnable`: only those that this version of rlqwen trains with.
    """
    found = [
        layout
        for layout in _dividing(planner)
        if not layout.faults(planner.size.text_config) and (layout.is_runnable or not runnable)
    ]
    busy = [layout for layout in found if layout.data_ranks * layout.pp <= planner.work.sequences]
    return busy or found


def _dividing(planner: RunPlanner) -> Iterator[ParallelLayout]:
    config, ranks = planner.size.text_config, planner.train_gpus
    _, experts = chosen_experts(config)
    is_whole = planner.size.adapters is None
    for tp in _divisors(ranks, NODE if is_whole else 1):
        for pp in _divisors(ranks // tp, config.num_hidden_layers if is_whole else 1):
            fsdp = ranks // (tp * pp)
            for ep in _divisors(fsdp, NODE // tp if is_whole and experts else 1):
                for sp in _divisors(fsdp, NODE // tp):
                    yield ParallelLayout(fsdp=fsdp, tp=tp, ep=ep, sp=sp, pp=pp)


def find_best(planner: RunPlanner, *, runnable: bool = False) -> RunPlan | None:
    """Return the simplest layout among the plans that fit and are nearly as fast as the fastest; None if none fits."""
    fitting = [plan for plan in all_plans(planner, runnable=runnable) if plan.fits]
    least = min((plan.step_seconds for plan in fitting), default=0.0)
    near = [plan for plan in fitting if plan.step_seconds <= NEARLY * least]
    return min(near, key=lambda plan: (_complexity(plan.layout), plan.step_seconds), default=None)


def all_plans(planner: RunPlanner, *, runnable: bool = False) -> Iterator[RunPlan]:
    """Yield plans of each layout: with and without recomputation, and with micro-batches of several sizes.

    Engines of a GPU that all plans share have as many GPUs each as lets them sample fastest.
    """
    recipe = _with_engines(planner)
    sizes = sorted({*_MICRO_BATCHES, recipe.train.per_device_train_batch_size})
    variants = [
        (size, _with_train(recipe, gradient_checkpointing=checkpointing, per_device_train_batch_size=size))
        for checkpointing in (False, True)
        for size in sizes
    ]
    for layout in layouts(planner, runnable=runnable):
        most = max(1, planner.work.sequences // layout.data_ranks)
        for size, variant in variants:
            if size <= most:
                yield planner.plan(layout, variant)


def _with_engines(planner: RunPlanner) -> Recipe:
    """Return the recipe with the number of GPUs per engine that samples fastest, if weights and a cache fit on them."""
    recipe, train = planner.recipe, planner.recipe.train
    if not isinstance(train, OnlineConfig):
        return recipe
    config = planner.size.text_config
    options = []
    for ranks in _divisors(planner.rollout_gpus or planner.cluster.count, NODE):
        changed = _with_train(recipe, rollout=train.rollout.model_copy(update={"tensor_parallel_size": ranks}))
        seconds, memory = planner.sampling(changed)
        if config.num_attention_heads % ranks == 0 and memory <= USABLE * planner.cluster.gpu.memory:
            options.append((seconds, ranks, changed))
    return min(options, key=lambda option: option[:2])[2] if options else recipe


def _with_train(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _complexity(layout: ParallelLayout) -> int:
    return sum(weight for name, weight in _WEIGHTS.items() if getattr(layout, name) > 1)


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]
