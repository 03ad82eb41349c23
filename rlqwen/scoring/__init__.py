"""Rewards in worker processes with hard deadlines.

Imported lazily: a worker process passes through this package and must start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen.scoring.build import build_rewards
    from rlqwen.scoring.ledger import Tally
    from rlqwen.scoring.scorer import Scorer

_HOMES = {
    "Scorer": "rlqwen.scoring.scorer",
    "Tally": "rlqwen.scoring.ledger",
    "build_rewards": "rlqwen.scoring.build",
}

__all__ = ["Scorer", "Tally", "build_rewards"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlqwen.scoring' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
