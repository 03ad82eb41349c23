"""Every config model: pydantic, unknown keys forbidden, no torch."""

from rlqwen.config.base import Config
from rlqwen.config.data import DataConfig, SourceConfig
from rlqwen.config.grpo import GRPOConfig
from rlqwen.config.recipe import LoraSettings, ModelConfig, Recipe, RewardSpec
from rlqwen.config.rollout import RolloutConfig, ScoringConfig
from rlqwen.config.sft import SFTConfig
from rlqwen.config.trainer import TrainerConfig

__all__ = [
    "Config",
    "DataConfig",
    "GRPOConfig",
    "LoraSettings",
    "ModelConfig",
    "Recipe",
    "RewardSpec",
    "RolloutConfig",
    "SFTConfig",
    "ScoringConfig",
    "SourceConfig",
    "TrainerConfig",
]
