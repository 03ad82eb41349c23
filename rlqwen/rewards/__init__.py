"""Call rewards in worker processes with hard deadlines.

Names are imported lazily, because worker processes import this package and must start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen.rewards.call_counts import CallCounts
    from rlqwen.rewards.reward_funcs import build_rewards
    from rlqwen.rewards.scorer import Scorer

_MODULES = {
    "Scorer": "rlqwen.rewards.scorer",
    "CallCounts": "rlqwen.rewards.call_counts",
    "build_rewards": "rlqwen.rewards.reward_funcs",
}

__all__ = ["CallCounts", "Scorer", "build_rewards"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rlqwen.rewards' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
