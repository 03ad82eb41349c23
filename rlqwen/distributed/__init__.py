"""Carry out updates on one process or several; no other package knows the number of processes."""

from rlqwen.distributed.device import compute_dtype, pick_device
from rlqwen.distributed.lr_schedule import warmup_updates
from rlqwen.distributed.main_rank import MainRank, on_all_ranks, on_this_rank
from rlqwen.distributed.optimizer_step import OptimizerStep, UpdateResult
from rlqwen.distributed.parameter_group import ParameterGroup
from rlqwen.distributed.ranks import Ranks, is_loss_of_rank
from rlqwen.distributed.whole_weights import exact_weight, gathered, has_exact, is_sharded, keep_exact, whole_model
from rlqwen.distributed.zero_step import build_optimizer_step

__all__ = [
    "MainRank",
    "OptimizerStep",
    "ParameterGroup",
    "Ranks",
    "UpdateResult",
    "build_optimizer_step",
    "compute_dtype",
    "exact_weight",
    "gathered",
    "has_exact",
    "is_loss_of_rank",
    "is_sharded",
    "keep_exact",
    "on_all_ranks",
    "on_this_rank",
    "pick_device",
    "warmup_updates",
    "whole_model",
]
