"""List which keys of a ds_config have an effect here."""

from collections.abc import Iterator, Mapping
from typing import Any

ALWAYS = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
        "sequence_parallel_size", "tensor_parallel.autotp_size", "bf16.enabled",
        *(f"fp16.{key}" for key in (
            "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale", "hysteresis",
            "consecutive_hysteresis",
        )),
        "zero_optimization.stage", "zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device",
        "optimizer.type",
        *(f"optimizer.params.{key}" for key in (
            "lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction", "amsgrad", "torch_adam",
        )),
        "scheduler.type",
        *(f"scheduler.params.{key}" for key in (
            "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps", "warmup_min_ratio",
            "cos_min_ratio",
        )),
    }
)  # fmt: skip
"""Keys that become fields of ours and always have an effect."""
OF_ENGINE = frozenset(
    {
        "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "data_types",
        "aio", "comms_logger",
    }
)  # fmt: skip
"""Sections that DeepSpeed's engine applies from stage 1 on; at stage 0 there is no engine."""


def engine_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a ds_config that is passed on to DeepSpeed."""
    return {key: value for key, value in given.items() if key in OF_ENGINE}


def unused_keys(given: Mapping[str, Any], zero_stage: int) -> list[str]:
    """Return the key paths of a ds_config that change nothing here, except those that ask for nothing."""
    return [
        path
        for path, value in _leaves(given)
        if path not in ALWAYS and not (zero_stage and path.partition(".")[0] in OF_ENGINE) and _asks(path, value, given)
    ]


def unused_note(given: Mapping[str, Any], zero_stage: int) -> str | None:
    """Return one line that names the unused keys; None if there are none."""
    unused = unused_keys(given, zero_stage)
    at = "" if zero_stage else ", of which ZeRO stage 0 carries out its batch, precision, optimizer and scheduler"
    return f"keys of the ds_config not used{at}: {', '.join(unused)}" if unused else None


def _asks(path: str, value: Any, given: Mapping[str, Any]) -> bool:
    """Return whether a value asks for anything: false, null and disabled sections do not."""
    section = given[path.partition(".")[0]]
    off = isinstance(section, Mapping) and section.get("enabled") is False
    return value is not None and value is not False and value != "auto" and not off


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(inner, Mapping):
            yield from _leaves(inner, here)
        else:
            yield here, inner
