"""Post-train Qwen models: SFT, DPO and GRPO over one policy wrapper, vLLM rollouts managed by Ray, rewards as plugins.

The public names are imported on first use, so `import rlqwen` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen.config import DPOConfig, GRPOConfig, RolloutConfig, ScoringConfig, SFTConfig
    from rlqwen.trainers.dpo import DPOTrainer
    from rlqwen.trainers.grpo import GRPOTrainer
    from rlqwen.trainers.sft import SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "DPOConfig": "rlqwen.config",
    "DPOTrainer": "rlqwen.trainers.dpo",
    "GRPOConfig": "rlqwen.config",
    "GRPOTrainer": "rlqwen.trainers.grpo",
    "RolloutConfig": "rlqwen.config",
    "SFTConfig": "rlqwen.config",
    "SFTTrainer": "rlqwen.trainers.sft",
    "ScoringConfig": "rlqwen.config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RolloutConfig",
    "SFTConfig",
    "SFTTrainer",
    "ScoringConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlqwen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
