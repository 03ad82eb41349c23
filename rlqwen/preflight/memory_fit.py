"""Find the cheapest change of a recipe that lets it fit on a GPU."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlqwen.config import DPOConfig, OnlineConfig, PPOConfig, Recipe
from rlqwen.errors import ResourceError
from rlqwen.preflight.memory_plan import GIB, LOAD, SAMPLING, SYNC, USABLE, MemoryPlan

Change = dict[str, Any]
"""Keys of a recipe -> new values."""
Planner = Callable[[Recipe], MemoryPlan]


def fits(plan: MemoryPlan, gpu_bytes: float) -> bool:
    """Return whether a GPU holds every phase of a plan."""
    return plan.smallest_gpu <= gpu_bytes


def check_fit(recipe: Recipe, plan_of: Planner, gpu_bytes: float, num_ranks: int) -> None:
    """Raise ResourceError, with the cheapest change that fits, if a GPU does not hold the recipe's plan."""
    plan = plan_of(recipe)
    if fits(plan, gpu_bytes):
        return
    change = find_change(recipe, plan_of, gpu_bytes, num_ranks)
    if change is None:
        advice = "no change of its keys fits: take a larger GPU, a smaller model, or more ranks (--nproc-per-node)"
    else:
        words = " ".join(f"{key}={_as_yaml(value)}" for key, value in change.items())
        advice = (
            f"the cheapest change that fits is {words} ({plan_of(changed(recipe, change)).smallest_gpu / GIB:.1f} GiB)"
        )
    raise ResourceError(f"{needs_in_words(plan)}, and this one has {gpu_bytes / GIB:.1f} GiB; {advice}")


def needs_in_words(plan: MemoryPlan) -> str:
    """Return the beginning of a message: what takes most memory, and which GPU that needs."""
    return (
        f"memory: {plan.peak_phase} takes {plan.peak / GIB:.1f} GiB{_with_engine(plan)}, which needs a GPU of "
        f"{_size(plan.smallest_gpu)}"
    )


def find_change(recipe: Recipe, plan_of: Planner, gpu_bytes: float, num_ranks: int) -> Change | None:
    """Return the first single change that fits, in the order of what they cost, or several together; None: none does."""
    taken: Change = {}
    largest: list[Change] = []
    for options in _changes(recipe, plan_of, gpu_bytes, num_ranks):
        for change in options:
            if fits(plan_of(changed(recipe, change)), gpu_bytes):
                return change
        largest += options[-1:]
    for change in largest:
        before = plan_of(changed(recipe, taken)).smallest_gpu
        after = plan_of(changed(recipe, taken | change)).smallest_gpu
        if after < before:
            taken |= change
        if after <= gpu_bytes:
            return taken
    return None


def changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """Return a copy of the recipe with other values at dotted keys."""
    copy = recipe.model_copy(deep=True)
    for key, value in change.items():
        *path, last = key.split(".")
        holder: Any = copy
        for name in path:
            holder = getattr(copy.train if holder is copy and not hasattr(copy, name) else holder, name)
        # Past validation, which reads one key at a time and would refuse a combination halfway.
        holder.__dict__[last] = value
    return copy


def _changes(recipe: Recipe, plan_of: Planner, gpu_bytes: float, num_ranks: int) -> Iterator[list[Change]]:
    """Yield alternatives in the order of what they cost, the values of each from mild to strong."""
    train = recipe.train
    if train.gradient_checkpointing in (False, "selective"):
        stronger: list[bool | str] = [True] if train.gradient_checkpointing else ["selective", True]
        yield [{"train.gradient_checkpointing": value} for value in stronger]
    rows = plan_of(recipe).micro_batch
    sizes = itertools.takewhile(lambda size: size >= rows.longest, (rows.tokens >> shift for shift in range(1, 20)))
    yield [{"train.max_tokens_per_micro_batch": size} for size in sizes]
    if isinstance(train, OnlineConfig) and plan_of(recipe).engine_share:
        yield _engine_shares(plan_of(recipe), gpu_bytes)
    if not train.parallel.zero_stage and not train.has_8bit_optimizer:
        yield [{"train.optim": "adamw_bnb_8bit"}]
    if isinstance(train, DPOConfig) and train.needs_reference and not train.precompute_ref_log_probs:
        yield [{"train.precompute_ref_log_probs": True}]
    if isinstance(train, PPOConfig) and train.critic.kind == "model":
        yield [{"train.critic.kind": "head"}]
    if not train.parallel.autotp_size > 1 and train.parallel.engine == "deepspeed":
        stage = train.parallel.zero_stage
        if num_ranks > 1 and not train.has_8bit_optimizer:
            yield [{"parallel.zero_stage": higher} for higher in range(stage + 1, 4)]
        if not train.parallel.offload_optimizer and not train.has_8bit_optimizer:
            yield [{"parallel.zero_stage": max(stage, 1), "parallel.offload_optimizer": True}]
    if recipe.model.lora is None:
        yield [{"model.lora": {"r": 16}, "model.dtype": "bfloat16"}]
    if recipe.model.quantization is None:
        lora = {} if recipe.model.lora else {"model.lora": {"r": 16}}
        yield [lora | {"model.quantization": {"bits": 4}}]


def _engine_shares(plan: MemoryPlan, gpu_bytes: float) -> list[Change]:
    """Return the largest share, in steps of 0.05, that leaves the trainer its room, if it is enough for the engine."""
    shared = (SAMPLING, SYNC) if plan.engine_sleeps else [phase for phase in plan.phases if phase != LOAD]
    trainer = max(plan.total(phase) for phase in shared)
    share = int((USABLE - trainer / gpu_bytes) * 20) / 20
    is_enough = share > 0 and share * gpu_bytes >= plan.engine_bytes and share < plan.engine_share
    return [{"rollout.gpu_memory_utilization": share}] if is_enough else []


def _with_engine(plan: MemoryPlan) -> str:
    if not plan.engine_bytes:
        return ""
    taken = (
        f"{plan.engine_share:.0%} of the GPU" if plan.engine_share else f"at least {plan.engine_bytes / GIB:.1f} GiB"
    )
    return f" and the vLLM engine {taken}{' in sampling' if plan.engine_sleeps else ''}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes < float("inf") else "any size"


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{key}: {inner}" for key, inner in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
