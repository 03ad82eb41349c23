"""On how many processes an update is carried out, and how: the only package that knows."""

from rlqwen.parallel.device import pick_device
from rlqwen.parallel.lead import Lead
from rlqwen.parallel.part import Part
from rlqwen.parallel.ranks import Ranks, is_loss_of_rank
from rlqwen.parallel.schedule import warmup_updates
from rlqwen.parallel.sharded_updater import build_updater
from rlqwen.parallel.shards import exact_weight, gathered, has_exact, is_sharded, keep_exact, whole_model
from rlqwen.parallel.updater import Updater, UpdateResult

__all__ = [
    "Lead",
    "Part",
    "Ranks",
    "UpdateResult",
    "Updater",
    "build_updater",
    "exact_weight",
    "gathered",
    "has_exact",
    "is_loss_of_rank",
    "is_sharded",
    "keep_exact",
    "pick_device",
    "warmup_updates",
    "whole_model",
]
