"""Report what a recipe trains of its model, and how much memory that takes."""

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlqwen.config import DPOConfig, ModelConfig, OnlineConfig, PPOConfig, Recipe
from rlqwen.errors import ModelError
from rlqwen.models.carried_weights import count_text
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_check import ConfigFacts, read_config
from rlqwen.preflight.parameter_counts import (
    ParameterCounts,
    chosen_experts,
    count_parameters,
    meta_model,
    trained_parameters,
)
from rlqwen.preflight.settings_check import check_rollout_dtype, check_settings
from rlqwen.rollout.engine import engine_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED = ("attention", "delta-net", "MLP", "shared experts")
"""Groups of linear layers that bitsandbytes quantizes; it leaves fused experts, embedding and head as they are."""
_SPOKEN = {"ref_model": "reference"}
_SHARED = {
    1: "ZeRO-1 shares Adam's state out among the ranks",
    2: "ZeRO-2 shares gradients and Adam's state out among the ranks",
    3: "ZeRO-3 shares all of it out among the ranks",
}


def describe_parameters(report: CheckReport, recipe: Recipe, facts: ConfigFacts) -> None:
    """Add to the report how many parameters are trained, frozen and carried, and their memory.

    `facts`: those of the starting model. A model that cannot be built is a warning, because other code may still load
    it; an adapter that does not fit is a fault.
    """
    try:
        model = meta_model(facts.config, scalar=recipe.train.trains_scalar_model)
    except ModelError as error:
        report.warnings.append(f"parameters were not counted: {error}")
        return
    check_settings(report, recipe, facts, model)
    counts = count_parameters(facts.config, model, facts.folder)
    report.facts.append(("parameters", _parts_in_words(counts, facts.config)))
    if counts.carried:
        kept = ", ".join(f"{part} {count_text(number)}" for part, number in counts.carried.items())
        report.facts.append(("carried", f"{kept}: neither trained nor used, and kept in every folder that is written"))
    with report.collecting():
        trained, summary = _trained(report, recipe, model, counts)
        report.facts.append(("trained", summary))
        report.facts.append(("memory", _memory_in_words(recipe, trained, counts, facts.dtype)))
    check_rollout_dtype(report, recipe, facts)


def _parts_in_words(counts: ParameterCounts, config: Any) -> str:
    used, experts = chosen_experts(config.get_text_config())
    named = []
    for part, number in counts.parts.items():
        chosen = f" ({used} of {experts} a token)" if part == "routed experts" and experts else ""
        named.append(f"{part} {count_text(number)}{chosen}")
    if "head" not in counts.parts:
        named.append("head tied to the embedding")
    active = f", {count_text(counts.active)} active for each token" if counts.active != counts.total else ""
    return f"{count_text(counts.total)}{active}: {', '.join(named)}"


def _trained(report: CheckReport, recipe: Recipe, model: "PreTrainedModel", counts: ParameterCounts) -> tuple[int, str]:
    """Return how many parameters are trained, and which."""
    if recipe.model.lora is None:
        return counts.total, f"all {count_text(counts.total)}"
    targets, notes = trained_parameters(model, recipe.model.lora)
    report.warnings += notes
    trained = sum(targets.values())
    named = ", ".join(f"{target} {count_text(number)}" for target, number in sorted(targets.items()))
    summary = f"{count_text(trained)} ({trained / counts.total:.2%}) in adapters: {named}; the rest is frozen"
    return trained, summary


def _memory_in_words(recipe: Recipe, trained: int, counts: ParameterCounts, dtype: str) -> str:
    """Return the bytes of weights, gradients and Adam's two moments. Activations depend on the rows, and are left
    out."""
    settings, train, total = recipe.model, recipe.train, counts.total
    if settings.lora is None:
        parts = {"weights": 4 * trained}
    else:
        frozen_dtype = dtype if settings.dtype == "auto" else settings.dtype
        width, size = frozen_dtype, total * _BYTES.get(frozen_dtype, 4)
        if settings.quantization is not None:
            quantized = sum(counts.parts.get(part, 0) for part in _QUANTIZED)
            width = f"{settings.quantization.bits} bits"
            size -= int(quantized * (_BYTES.get(frozen_dtype, 4) - settings.quantization.bits / 8))
        parts = {f"frozen weights in {width}": size, "adapters": 4 * trained}
    parts |= {"gradients": 4 * trained, "Adam": 8 * trained}
    if isinstance(train, PPOConfig) and train.critic.kind == "model" and train.critic.path is None:
        parts["the critic, another such model"] = sum(parts.values())
    if settings.lora is None and _holds_reference(recipe):
        parts["the reference"] = total * (4 if train.bf16 is False else 2)
    parts |= _other_models(recipe)
    named = ", ".join(f"{part} {_gigabytes(size)}" for part, size in parts.items())
    line = f"{_gigabytes(sum(parts.values()))}: {named}"
    if train.parallel.zero_stage:
        line += f"; {_SHARED[train.parallel.zero_stage]}"
    if isinstance(train, OnlineConfig) and engine_class(train.rollout).in_workers:
        line += f"; each rollout worker holds {_gigabytes(2 * total)} of weights in bfloat16 besides"
    return f"{line}; activations come on top"


def _holds_reference(recipe: Recipe) -> bool:
    """Return whether a frozen copy of the model stays in memory beside the one that is trained."""
    train = recipe.train
    is_precomputed = isinstance(train, DPOConfig) and train.precompute_ref_log_probs
    return train.needs_reference and not is_precomputed


def _other_models(recipe: Recipe) -> dict[str, int]:
    """Return the bytes of the frozen models that the recipe names, such as a teacher; those that can be read now."""
    sizes = {}
    for key, path in recipe.train.other_models().items():
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(ModelError):
            facts = read_config(ModelConfig(path=path), Path(scratch))
            if facts is not None:
                total = count_parameters(facts.config, meta_model(facts.config, scalar=False), facts.folder).total
                sizes["the " + _SPOKEN.get(key, key)] = total * (4 if recipe.train.bf16 is False else 2)
    return sizes


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e8 else f"{size / 1e6:,.1f} MB"
