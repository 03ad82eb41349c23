"""Make DeepSpeed's config from the user's own and from rlqwen's settings."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from rlqwen.config import TrainerConfig
from rlqwen.config.deepspeed import AUTO, read_ds_config
from rlqwen.config.deepspeed_keys import engine_keys
from rlqwen.errors import ConfigError


def fp16_settings(args: TrainerConfig) -> dict[str, Any]:
    """Return the settings of a ds_config for loss scaling."""
    given = read_ds_config(args.parallel.deepspeed or {}).get("fp16", {})
    return {key: value for key, value in given.items() if value != AUTO}


def check_batch_size(args: TrainerConfig, data_size: int) -> int:
    """Return the sequences per update over all ranks; raise ConfigError if the ds_config has another number."""
    given = read_ds_config(args.parallel.deepspeed or {}).get("train_batch_size", AUTO)
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    whole = size * accumulation * data_size
    if given not in (None, AUTO, whole):
        raise ConfigError(
            f"train_batch_size of the ds_config is {given}, but the batch is {whole} = "
            f'{size} per micro-batch x {accumulation} accumulated x {data_size} ranks: correct it, or make it "auto"'
        )
    return whole


def complete_ds_config(args: TrainerConfig, *, data_size: int, hidden_size: int, dtype: str) -> dict[str, Any]:
    """Return the ds_config for an engine: those of the user's keys that an engine reads, without "auto".

    `dtype`: `fp32`, `bf16` or `fp16`; `data_size`: ranks that see different rows.

    Raises ConfigError for batch sizes that contradict each other and for an "auto" that has no meaning here.
    """
    parallel = args.parallel
    whole = check_batch_size(args, data_size)
    given = read_ds_config(parallel.deepspeed or {})
    config = copy.deepcopy(engine_keys(given))
    config |= {
        "train_batch_size": whole * parallel.ranks_per_row,  # DeepSpeed assumes that every rank sees other rows
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "managed_gradient_accumulation": False,  # the number of micro-batches varies, and the optimizer step counts them
        "gradient_clipping": args.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: nothing is compiled
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "loss_scale": 1.0},  # the optimizer step scales
    }
    config["steps_per_print"] = 10**9
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = parallel.zero_stage
    if parallel.zero_stage == 1 and dtype == "bf16" and not parallel.offload_optimizer:
        zero["stage"] = 2  # for stage 1 DeepSpeed has another optimizer, which keeps all gradients on every rank
    for key, wanted in (
        ("offload_optimizer", parallel.offload_optimizer),
        ("offload_param", parallel.offload_parameters),
    ):
        if wanted:
            section = zero.setdefault(key, {})
            section.setdefault("device", "cpu")
    _fill_in_sizes(zero, hidden_size)
    left = list(_autos(config))
    if left:
        raise ConfigError(f'"auto" of the ds_config has no meaning at {", ".join(left)}: give a value, or leave it out')
    return config


def _fill_in_sizes(zero: dict[str, Any], hidden_size: int) -> None:
    """Fill in the sizes of buffers (in elements) as transformers does, except that nothing is prefetched.

    DeepSpeed prefetches weights in the order of the last forward, and evaluations and exports read them in another one.
    """
    zero.setdefault("stage3_prefetch_bucket_size", 0)
    square = hidden_size * hidden_size
    sizes = {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = value


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if value == AUTO:
        yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}" if path else str(key))
