"""Report a plan: in lines and a table of memory for people, and as values for programs."""

from typing import Any

from rlqwen.errors import ResourceError
from rlqwen.planning.cheapest_change import Change
from rlqwen.planning.flops import token_flops
from rlqwen.planning.gpus import MOST_GPUS
from rlqwen.planning.run_plan import RunPlan
from rlqwen.planning.step_time import UpdateTime
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.memory_estimate import memory_figures, parts_in_words
from rlqwen.preflight.memory_fit import needs_in_words
from rlqwen.preflight.memory_plan import GIB
from rlqwen.preflight.model_size import ModelSize

_STEPS = 1000
"""Steps whose cost is said where the length of the run is unknown."""


def report_plan(
    plan: RunPlan, size: ModelSize, *, change: Change | None = None, is_mean_known: bool = True
) -> CheckReport:
    """Return the report; a plan that does not fit is a fault, with the cheapest change that fits.

    `is_mean_known`: whether the mean length of rows or completions was given, and not the most that is allowed.
    """
    gpu = plan.cluster.gpu
    report = CheckReport(f"{plan.recipe.model.path} ({plan.recipe.algorithm}) on {plan.cluster}")
    report.facts += [
        ("model", parts_in_words(size.counts, size.facts.config)),
        ("layout", f"{plan.layout}: {_ranks_in_words(plan)}"),
        ("batch", _batch_in_words(plan)),
        (
            "memory",
            f"{plan.peak / GIB:.1f} of {gpu.memory / GIB:.1f} GiB per GPU, at the peak in {plan.peak_phase}",
        ),
        ("update", f"{_seconds(plan.update.total)}: {_parts_of_time(plan.update)}"),
    ]
    if plan.rollout is not None and plan.engines is not None:
        report.facts += [
            ("rollout", f"{_seconds(plan.rollout.total)}, {plan.rollout_share:.0%} of the step: {_parts_of_time(plan.rollout)}"),
            ("engines", _engines_in_words(plan)),
            ("weight sync", _seconds(plan.sync)),
        ]  # fmt: skip
    report.facts += [
        ("step", _step_in_words(plan)),
        ("throughput", _throughput_in_words(plan, size)),
        ("run", _run_in_words(plan)),
    ]  # fmt: skip
    title = f"memory of each of {plan.cluster.count} GPUs, GiB" if plan.cluster.count > 1 else "memory, GiB"
    report.figures.append(memory_figures(plan.memory, title, gpu.memory))
    report.warnings.append(
        "seconds are estimates: the documentation (Plan a run) says how far they were from what was measured"
    )
    if not is_mean_known:
        report.warnings.append(
            "rows and completions count as long as they may be: --mean-tokens gives their mean length"
        )
    if plan.layout.data_ranks > plan.work.sequences:
        report.warnings.append(
            f"an update has {plan.work.sequences} sequences for {plan.layout.data_ranks} data ranks: the others idle"
        )
    if plan.layout.engine == "megatron":
        report.warnings.append("engine=megatron is for comparison: rlqwen does not run Megatron-LM")
    if not plan.fits:
        report.faults.append(ResourceError(_not_fitting(plan, change)))
    return report


def plan_values(plan: RunPlan, size: ModelSize, change: Change | None = None) -> dict[str, Any]:
    """Return the plan as JSON values: bytes, seconds and counts."""
    return {
        "model": plan.recipe.model.path,
        "algorithm": plan.recipe.algorithm,
        "gpus": str(plan.cluster),
        "layout": str(plan.layout),
        "parameters": size.total,
        "active_parameters": size.counts.active,
        "trained_parameters": size.num_trained,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "peak_phase": plan.peak_phase,
        "memory": plan.memory.parts | {"vLLM engine": plan.memory.engine_memory(plan.cluster.gpu.memory)},
        "micro_batches": plan.micro_batches,
        "update_seconds": plan.update.parts,
        "rollout_seconds": plan.rollout.parts if plan.rollout else {},
        "rollout_share": plan.rollout_share,
        "sync_seconds": plan.sync,
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": model_flops_share(plan, size),
        "steps": plan.work.num_steps,
        "gpu_hours": plan.gpu_hours,
        "change": change and {"words": change.words, "peak_bytes": change.plan.peak},
    }


def model_flops_share(plan: RunPlan, size: ModelSize) -> float:
    """Return the share of peak FLOP/s that training all weights once without recomputation would take (MFU)."""
    flops = token_flops(size, plan.work.length).model * plan.work.tokens / plan.update.total
    return flops / (plan.layout.num_ranks * plan.cluster.gpu.flops)


def _ranks_in_words(plan: RunPlan) -> str:
    layout = plan.layout
    held = {
        "fsdp2": "weights, gradients and optimizer in shards (FSDP2)"
        if layout.num_ranks > 1
        else "one GPU holds everything",
        "deepspeed": f"DeepSpeed ZeRO {layout.zero_stage}" if layout.zero_stage else "each holds everything",
        "megatron": "Megatron-LM with a distributed optimizer",
    }[layout.engine]
    if layout.num_ranks == 1:
        return "one GPU holds everything"
    rows = "the same row" if layout.data_ranks == 1 else f"{layout.data_ranks} different rows"
    return f"{layout.num_ranks} training ranks see {rows} at a time; {held}"


def _batch_in_words(plan: RunPlan) -> str:
    work = plan.work
    return (
        f"{work.sequences} sequences, {work.tokens:,.0f} tokens per update = {_count(plan.layout.data_ranks, 'data rank')} x "
        f"{_count(plan.micro_batches, 'micro-batch', 'es')} of up to "
        f"{plan.memory.micro_batch.tokens:,} tokens"
    )


def _engines_in_words(plan: RunPlan) -> str:
    assert plan.engines is not None
    engines, work = plan.engines, plan.work
    how = "while the policy trains" if plan.overlaps else "before the policy trains"
    return (
        f"{_count(engines.count, 'engine')} of {_count(engines.tensor_ranks, 'GPU')}, decoding "
        f"{_count(engines.batch, 'completion')} at a time; {work.completions_per_step} completions of {work.completion:,.0f} tokens per step, {how}"
    )


def _step_in_words(plan: RunPlan) -> str:
    updates = plan.work.updates_per_step
    return f"{_seconds(plan.step_seconds)} with {_count(updates, 'update')}"


def _throughput_in_words(plan: RunPlan, size: ModelSize) -> str:
    each, share = plan.tokens_per_second / plan.cluster.count, model_flops_share(plan, size)
    return f"{plan.tokens_per_second:,.0f} tokens/s, {each:,.0f} per GPU; updates at {share:.0%} of peak FLOP/s (MFU)"


def _run_in_words(plan: RunPlan) -> str:
    hours = plan.step_seconds / 3600
    if plan.gpu_hours is not None:
        steps = plan.work.num_steps or 0
        return f"{steps:,} steps: {steps * hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU-hours"
    return (
        f"{_STEPS:,} steps: {_STEPS * hours:,.1f} hours, {_STEPS * hours * plan.cluster.count:,.0f} GPU-hours "
        "(--rows gives the rows of the data, or set train.max_steps)"
    )


def _not_fitting(plan: RunPlan, change: Change | None) -> str:
    advice = (
        f"no change was found that fits on up to {MOST_GPUS:,} of these GPUs: take larger ones, or a smaller model"
        if change is None
        else f"the cheapest change that fits is {change.words} ({change.plan.peak / GIB:.1f} GiB, "
        f"{change.plan.tokens_per_second / change.plan.cluster.count:,.0f} tokens/s per GPU)"
    )
    gpu = plan.cluster.gpu
    return f"{needs_in_words(plan.memory)}, and {gpu.name} has {gpu.memory / GIB:.1f} GiB; {advice}"


def _parts_of_time(time: UpdateTime) -> str:
    largest = sorted(time.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in largest if seconds >= 0.005 * time.total)


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
