"""Report what a recipe trains of its model, and how much memory that takes."""

from typing import Any

from rlqwen.config import LoraSettings, QuantizationSettings, Recipe
from rlqwen.errors import ModelError
from rlqwen.models.carried_weights import count_text
from rlqwen.preflight.check_report import CheckReport, Figures
from rlqwen.preflight.memory_fit import check_fit
from rlqwen.preflight.memory_plan import GIB, MemoryPlan
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parameter_counts import ParameterCounts, chosen_experts, meta_model
from rlqwen.preflight.settings_check import check_rollout_dtype, check_settings


def describe_parameters(report: CheckReport, recipe: Recipe, facts: ConfigFacts) -> ModelSize | None:
    """Add to the report how many parameters are trained, frozen and carried, and return what their memory depends on.

    `facts`: those of the starting model. A model that cannot be built is a warning, because other code may still load
    it; an adapter that does not fit is a fault.
    """
    try:
        model = meta_model(facts.config, scalar=recipe.train.trains_scalar_model)
    except ModelError as error:
        report.warnings.append(f"parameters were not counted: {error}")
        return None
    check_settings(report, recipe, facts, model)
    size = None
    with report.collecting():
        size = ModelSize.measure(recipe, facts, model)
        report.facts.append(("parameters", parts_in_words(size.counts, facts.config)))
        if carried := size.counts.carried:
            kept = ", ".join(f"{part} {count_text(number)}" for part, number in carried.items())
            report.facts.append(
                ("carried", f"{kept}: neither trained nor used, and kept in every folder that is written")
            )
        report.warnings += size.notes
        report.facts.append(("trained", _trained_in_words(size)))
    check_rollout_dtype(report, recipe, facts)
    return size


def describe_memory(
    report: CheckReport,
    recipe: Recipe,
    size: ModelSize,
    *,
    longest: int | None = None,
    gpu_gib: float | None = None,
    num_ranks: int = 1,
) -> None:
    """Add the memory table to the report, and a fault if the GPUs are too small.

    `longest`: tokens of the longest row, or prompt, of the data; `gpu_gib`: memory of each GPU, None: as this machine
    has. If it has none, or the recipe trains on a CPU, the table is of that.
    """
    gpu_bytes = own_gpu_bytes() if gpu_gib is None else gpu_gib * GIB
    on_gpu = gpu_bytes is not None and not recipe.train.use_cpu
    sizes: dict[str, ModelSize] = {}

    def plan_of(changed: Recipe) -> MemoryPlan:
        # A change that is tried out is not validated, and holds mappings.
        if isinstance(changed.model.lora, dict):
            changed.model.lora = LoraSettings(**changed.model.lora)
        if isinstance(changed.model.quantization, dict):
            changed.model.quantization = QuantizationSettings(**changed.model.quantization)
        key = repr((changed.model.lora, changed.model.quantization, changed.model.dtype))
        if key not in sizes:
            sizes[key] = size if changed is recipe else size.with_lora(changed)
        return plan_memory(changed, sizes[key], longest=longest, num_ranks=num_ranks, on_gpu=on_gpu)

    plan = plan_of(recipe)
    where = f"; a GPU of {plan.smallest_gpu / GIB:.1f} GiB or more" if on_gpu else _own_memory_in_words(recipe)
    report.facts.append(("memory", _plan_in_words(plan) + where))
    each = "GPUs" if on_gpu else "ranks"
    title = f"memory{f' of each of {num_ranks} {each}' if num_ranks > 1 else ''}, GiB"
    report.figures.append(memory_figures(plan, title, gpu_bytes))
    if gpu_bytes is not None and on_gpu:
        with report.collecting():
            check_fit(recipe, plan_of, gpu_bytes, num_ranks)


def own_gpu_bytes() -> float | None:
    """Return the memory of this machine's smallest GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return float(min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))


def _own_memory_in_words(recipe: Recipe) -> str:
    import psutil

    hint = "" if recipe.train.use_cpu else "; --gpu-memory plans for a GPU"
    return f"; this machine has {psutil.virtual_memory().total / GIB:.1f} GiB, and trains on its CPU{hint}"


def parts_in_words(counts: ParameterCounts, config: Any) -> str:
    used, experts = chosen_experts(config.get_text_config())
    named = []
    for part, number in counts.parts.items():
        chosen = f" ({used} of {experts} a token)" if part == "routed experts" and experts else ""
        named.append(f"{part} {count_text(number)}{chosen}")
    if "head" not in counts.parts:
        named.append("head tied to the embedding")
    active = f", {count_text(counts.active)} active for each token" if counts.active != counts.total else ""
    return f"{count_text(counts.total)}{active}: {', '.join(named)}"


def _trained_in_words(size: ModelSize) -> str:
    if size.adapters is None:
        return f"all {count_text(size.total)}"
    named = ", ".join(f"{target} {count_text(number)}" for target, number in sorted(size.trained.items()))
    return (
        f"{count_text(size.num_trained)} ({size.num_trained / size.total:.2%}) in adapters: {named}; the rest is frozen"
    )


def _plan_in_words(plan: MemoryPlan) -> str:
    rows = plan.micro_batch
    line = f"{plan.peak / GIB:.2f} GiB at the peak, in {plan.peak_phase}, with rows of up to {rows.tokens:,} tokens"
    if plan.engine_share:
        line += f", beside a vLLM engine that takes {plan.engine_share:.0%} of the GPU"
    elif plan.engine_sleeps:
        line += ", beside a vLLM engine that takes what is free"
    if plan.engine_sleeps:
        line += " and sleeps while the policy trains"
    return line


def memory_figures(plan: MemoryPlan, title: str, gpu_bytes: float | None) -> Figures:
    """Return the plan as a table: parts in rows, phases in columns, the peak of each in the last one.

    `gpu_bytes`: the GPU that an engine takes its share of; None: the smallest that fits.
    """

    def cells(values: dict[str, float]) -> tuple[str, ...]:
        sizes = [values.get(phase, 0.0) for phase in plan.phases]
        return tuple(f"{size / GIB:.2f}" if size else "" for size in [*sizes, max(sizes)])

    engine = plan.engine_memory(gpu_bytes)
    rows = [(name, *cells(part)) for name, part in plan.parts.items()]
    rows += [("vLLM engine", *cells(engine))] if engine else []
    rows.append(("total", *cells({phase: plan.total(phase) + engine.get(phase, 0.0) for phase in plan.phases})))
    return Figures((title, *plan.phases, "peak"), rows)
