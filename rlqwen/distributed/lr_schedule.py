"""Schedule the learning rate: by transformers' schedules, or by the one in a user's ds_config."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from rlqwen.config import TrainerConfig
from rlqwen.config.deepspeed import AUTO, read_ds_config
from rlqwen.errors import ConfigError

_NAMES = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
"""Schedules that follow from the number of the update alone."""


def build_schedulers(args: TrainerConfig, optimizers: list[Optimizer], total_updates: int) -> list[Any]:
    """Build one schedule per optimizer, which scales the learning rates of all its groups by the same factor.

    Raises ConfigError if the schedule refuses its arguments.
    """
    section = read_ds_config(args.parallel.deepspeed or {}).get("scheduler")
    if not section and args.lr_scheduler_type not in _NAMES:
        raise ConfigError(
            f"lr_scheduler_type: unknown schedule {args.lr_scheduler_type!r}; "
            f"known: {', '.join(sorted(_NAMES))} (those that follow a metric are not)"
        )
    try:
        if section:
            ratio = deepspeed_ratio(section, args, total_updates)
            return [LambdaLR(optimizer, ratio) for optimizer in optimizers]
        return [
            get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=warmup_updates(args, total_updates),
                num_training_steps=total_updates,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
            for optimizer in optimizers
        ]
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        name = f"scheduler of the ds_config: {section}" if section else f"lr_scheduler_type={args.lr_scheduler_type!r}"
        raise ConfigError(f"{name}: {error}") from error


def deepspeed_ratio(section: dict[str, Any], args: TrainerConfig, total_updates: int) -> Callable[[int], float]:
    """Return the rate per update, from 0, as a share of the learning rate, computed by DeepSpeed's own class.

    "auto", and a total that is left out, are filled in from `args` and the run, as transformers does. The first update
    has the class's first rate; DeepSpeed's engine makes one more update with the rate from which the warm-up starts.
    """
    from deepspeed.runtime import lr_schedules

    params = {key: value for key, value in (section.get("params") or {}).items() if value != AUTO}
    kind = section["type"]
    if kind != "WarmupLR":
        params.setdefault("total_num_steps", total_updates)
    if (section.get("params") or {}).get("warmup_num_steps") == AUTO:
        params["warmup_num_steps"] = max(warmup_updates(args, total_updates), 1)
    if kind != "WarmupCosineLR":  # that one takes shares already
        params |= {
            "warmup_max_lr": 1.0,
            "warmup_min_lr": params.get("warmup_min_lr", 0.0) / (args.learning_rate or 1.0),
        }
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    logger = lr_schedules.logger
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn that the schedule has not started
    try:
        schedule = getattr(lr_schedules, kind)(stand_in, **params)
    finally:
        logger.setLevel(level)

    def ratio(update: int) -> float:
        schedule.last_batch_iteration = update
        return float(schedule.get_lr()[0])

    return ratio


def warmup_updates(args: TrainerConfig, total_updates: int) -> int:
    """Return the warm-up in updates, from `warmup_steps` (a count, or a share below 1) or `warmup_ratio`."""
    if args.warmup_steps >= 1:
        return int(args.warmup_steps)
    return math.ceil((args.warmup_steps or args.warmup_ratio) * total_updates)
