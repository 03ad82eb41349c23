"""Post-train Qwen models: SFT, reward models, DPO, PPO, GRPO and distillation on one policy wrapper, with vLLM rollouts managed by Ray.

The public names are imported on first use, so `import rlqwen` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen.config import (
        DistillationConfig,
        DPOConfig,
        GRPOConfig,
        PPOConfig,
        RewardConfig,
        RolloutConfig,
        ScoringConfig,
        SFTConfig,
    )
    from rlqwen.trainers.distillation import DistillationTrainer
    from rlqwen.trainers.dpo import DPOTrainer
    from rlqwen.trainers.grpo import GRPOTrainer
    from rlqwen.trainers.ppo import PPOTrainer
    from rlqwen.trainers.reward import RewardTrainer
    from rlqwen.trainers.sft import SFTTrainer

__version__ = "0.2.0"

_HOMES = {
    "DPOConfig": "rlqwen.config",
    "DPOTrainer": "rlqwen.trainers.dpo",
    "DistillationConfig": "rlqwen.config",
    "DistillationTrainer": "rlqwen.trainers.distillation",
    "GRPOConfig": "rlqwen.config",
    "GRPOTrainer": "rlqwen.trainers.grpo",
    "PPOConfig": "rlqwen.config",
    "PPOTrainer": "rlqwen.trainers.ppo",
    "RewardConfig": "rlqwen.config",
    "RewardTrainer": "rlqwen.trainers.reward",
    "RolloutConfig": "rlqwen.config",
    "SFTConfig": "rlqwen.config",
    "SFTTrainer": "rlqwen.trainers.sft",
    "ScoringConfig": "rlqwen.config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
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
