"""Every config model: pydantic, unknown keys forbidden, no torch."""

from rlqwen.config.base import Config
from rlqwen.config.data import DataConfig, SourceConfig
from rlqwen.config.dpo import DPOConfig
from rlqwen.config.grpo import GRPOConfig
from rlqwen.config.online import OnlineConfig
from rlqwen.config.ppo import PPOConfig
from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.recipe import LoraSettings, ModelConfig, QuantizationSettings, Recipe, RewardSpec
from rlqwen.config.reward import RewardConfig
from rlqwen.config.rollout import RolloutConfig, ScoringConfig
from rlqwen.config.sft import SFTConfig
from rlqwen.config.trainer import TrainerConfig

__all__ = [
    "Config",
    "DPOConfig",
    "DataConfig",
    "GRPOConfig",
    "LoraSettings",
    "ModelConfig",
    "OnlineConfig",
    "PPOConfig",
    "PreferenceConfig",
    "QuantizationSettings",
    "Recipe",
    "RewardConfig",
    "RewardSpec",
    "RolloutConfig",
    "SFTConfig",
    "ScoringConfig",
    "SourceConfig",
    "TrainerConfig",
]
