"""Read a user's ds_config, DeepSpeed's own JSON, as values of rlqwen's fields."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlqwen.config.base import section_values
from rlqwen.errors import ConfigError, quoted

AUTO = "auto"
Adopted = tuple[str, str, Any]
"""(key path in the ds_config, our key path, value)."""

_SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "zero_optimization.stage": "parallel.zero_stage",
}
"""Keys of a ds_config -> our fields with the same meaning."""
_OF_TEXT = ("lr_scheduler_type",)
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULE_KEYS = {
    "WarmupLR": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"},
    "WarmupDecayLR": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"},
    "WarmupCosineLR": {"warmup_min_ratio", "cos_min_ratio", "warmup_num_steps", "warmup_type", "total_num_steps"},
}
_ADAMW = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
"""Keys of an optimizer that make it AdamW, which is what rlqwen trains with."""


def adopt_ds_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trainer's arguments, completed by what their `deepspeed` (or `parallel.deepspeed`) says.

    Raises ValueError that names both keys and values if they contradict each other.
    """
    values = dict(values)
    parallel = section_values(values.get("parallel"))
    if parallel is None:
        return values
    if values.get("deepspeed") is not None:
        parallel.setdefault("deepspeed", values["deepspeed"])
    values.pop("deepspeed", None)
    if parallel.get("deepspeed") is not None:
        given = read_ds_config(parallel["deepspeed"])
        for theirs, ours, value in _statements(given, values):
            if isinstance(value, str) and ours not in _OF_TEXT:
                raise ValueError(
                    f"{theirs} of the ds_config is the text {quoted(value)}: write a number, or true or false, without quotes"
                )
            holder, key = (parallel, ours.removeprefix("parallel.")) if "." in ours else (values, ours)
            if holder.get(key) is None:
                holder[key] = value
            elif holder[key] != value:
                raise ValueError(
                    f"{ours} is {holder[key]!r}, and {theirs} of the ds_config is {value!r}: say it once, or make the "
                    'latter "auto"'
                )
        parallel["deepspeed"] = given
    if parallel:
        values["parallel"] = parallel
    return values


def read_ds_config(source: Any) -> dict[str, Any]:
    """Return the mapping itself, or what its JSON file holds; raise ValueError if that is not a mapping."""
    if isinstance(source, Mapping):
        return dict(source)
    try:
        if not Path(str(source)).is_file():
            raise ValueError(f"deepspeed: {str(source)!r} is not a file")
        read = json.loads(Path(str(source)).read_text("utf-8"))
    except RecursionError:
        raise ValueError(f"deepspeed: {str(source)!r} is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"deepspeed: {str(source)!r} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"deepspeed: {str(source)!r} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"deepspeed: {str(source)!r} holds a {type(read).__name__}, not an object")
    return read


def _statements(given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Adopted]:
    """Yield what a ds_config says about our fields."""
    for theirs, ours in _SAME.items():
        value = _at(given, theirs)
        if value not in (None, AUTO):
            yield theirs, ours, value
    betas = _at(given, "optimizer.params.betas")
    if betas not in (None, AUTO):
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"optimizer.params.betas of the ds_config is {quoted(betas)}, which is not two numbers")
        yield "optimizer.params.betas", "adam_beta1", betas[0]
        yield "optimizer.params.betas", "adam_beta2", betas[1]
    for name in ("optimizer", "param"):
        device = _at(given, f"zero_optimization.offload_{name}.device")
        if device not in (None, AUTO):
            ours = "parallel.offload_optimizer" if name == "optimizer" else "parallel.offload_parameters"
            yield f"zero_optimization.offload_{name}.device", ours, device != "none"
    for theirs, ours in (("tensor_parallel.autotp_size", "autotp_size"),
                         ("sequence_parallel_size", "sequence_parallel_size")):  # fmt: skip
        if _at(given, theirs) not in (None, AUTO):
            yield theirs, f"parallel.{ours}", _at(given, theirs)
    _check_optimizer(given)
    yield from _schedule(given, values)


def _check_optimizer(given: Mapping[str, Any]) -> None:
    """Raise ValueError unless the optimizer section describes AdamW."""
    kind = _at(given, "optimizer.type")
    if kind is not None and str(kind).lower() not in ("adam", "adamw"):
        raise ValueError(f"optimizer.type of the ds_config is {kind!r}, and rlqwen trains with AdamW: leave it out")
    for key, wanted in _ADAMW.items():
        value = _at(given, f"optimizer.params.{key}")
        if value not in (None, AUTO, wanted):
            raise ValueError(
                f"optimizer.params.{key} of the ds_config is {value!r}, and rlqwen's AdamW has {wanted}: leave it out"
            )


def _schedule(given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Adopted]:
    """Yield the nearest `lr_scheduler_type`; DeepSpeed computes the rates, see rlqwen.distributed.lr_schedule."""
    kind, params = _at(given, "scheduler.type"), _at(given, "scheduler.params") or {}
    if kind is None:
        return
    if not isinstance(params, Mapping):
        raise ValueError(f"scheduler.params of the ds_config is {quoted(params)}, which is not a mapping")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise ValueError(
            f"scheduler.type of the ds_config is {quoted(kind)}; rlqwen has {', '.join(_SCHEDULES)}, and others by "
            "lr_scheduler_type: leave `scheduler` out of the ds_config"
        )
    unknown = sorted(set(params) - _SCHEDULE_KEYS[kind])
    if unknown:
        raise ValueError(
            f"scheduler.params.{unknown[0]} of the ds_config: DeepSpeed's {kind} takes {', '.join(sorted(_SCHEDULE_KEYS[kind]))}"
        )
    if params.get("warmup_type") not in (None, AUTO, "log", "linear"):
        raise ValueError(
            f"scheduler.params.warmup_type of the ds_config is {quoted(params['warmup_type'])}: log or linear"
        )
    for key, value in params.items():
        if key != "warmup_type" and value != AUTO and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"scheduler.params.{key} of the ds_config is {str(value)[:200]!r}, which is not a number")
    if values.get("lr_scheduler_kwargs"):
        raise ValueError(f"lr_scheduler_kwargs and scheduler.params of the ds_config ({kind}): set only one of them")
    yield "scheduler.type", "lr_scheduler_type", _SCHEDULES[kind]


def accumulation_of(deepspeed: Any, size: int, accumulation: int | None, data_size: int) -> int | None:
    """Return the micro-batches per update that follow from a ds_config's `train_batch_size`; None if it has none.

    `size`: sequences per micro-batch; `accumulation`: micro-batches that something else sets, if so; `data_size`: ranks
    that see different rows. Raises ConfigError if the three do not give that batch.
    """
    whole = read_ds_config(deepspeed or {}).get("train_batch_size", AUTO)
    if whole in (None, AUTO):
        return None
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
        raise ConfigError(f"train_batch_size of the ds_config is {quoted(whole)}, which is not a positive whole number")
    ranks = f"{data_size} rank{'' if data_size == 1 else 's'}"
    if accumulation is not None and size * accumulation * data_size != whole:
        raise ConfigError(
            f"train_batch_size of the ds_config is {whole}, but the batch is {size * accumulation * data_size} = "
            f'{size} per micro-batch x {accumulation} accumulated x {ranks}: correct it, or make it "auto"'
        )
    if whole % (size * data_size):
        raise ConfigError(
            f"train_batch_size of the ds_config is {whole}, which {size} per micro-batch x {ranks} do not divide"
        )
    return whole // (size * data_size)


def _at(given: Mapping[str, Any], path: str) -> Any:
    value: Any = given
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value
