"""Rewards in worker processes with hard deadlines.

Imported lazily: a worker process passes through this package and must start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen.rewards.build import build_rewards
    from rlqwen.rewards.call_counts import CallCounts
    from rlqwen.rewards.scorer import Scorer

_HOMES = {
    "Scorer": "rlqwen.rewards.scorer",
    "CallCounts": "rlqwen.rewards.call_counts",
    "build_rewards": "rlqwen.rewards.build",
}

__all__ = ["CallCounts", "Scorer", "build_rewards"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlqwen.rewards' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
