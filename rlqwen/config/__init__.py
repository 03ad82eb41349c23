"""Define every config model in pydantic: unknown keys are refused, and torch is not imported."""

from rlqwen.config.base import Config
from rlqwen.config.cleaning import CleaningConfig, NearDuplicatesConfig, PatternConfig
from rlqwen.config.data import DataConfig, SampledPairsConfig, SourceConfig
from rlqwen.config.distillation import DistillationConfig
from rlqwen.config.dpo import DPOConfig
from rlqwen.config.evaluation import EvalGenerationConfig
from rlqwen.config.grpo import GRPOConfig
from rlqwen.config.online import OnlineConfig
from rlqwen.config.parallel import ParallelConfig
from rlqwen.config.ppo import CriticConfig, PPOConfig
from rlqwen.config.preference import PreferenceConfig
from rlqwen.config.recipe import LoraSettings, ModelConfig, QuantizationSettings, Recipe
from rlqwen.config.reference import SyncedReference
from rlqwen.config.reward import RewardConfig
from rlqwen.config.rollout import RewardSpec, RolloutConfig, ScoringConfig
from rlqwen.config.sft import SFTConfig
from rlqwen.config.trainer import TrainerConfig
from rlqwen.config.watch import WatchConfig

__all__ = [
    "CleaningConfig",
    "Config",
    "CriticConfig",
    "DPOConfig",
    "DataConfig",
    "DistillationConfig",
    "EvalGenerationConfig",
    "GRPOConfig",
    "LoraSettings",
    "ModelConfig",
    "NearDuplicatesConfig",
    "OnlineConfig",
    "PPOConfig",
    "ParallelConfig",
    "PatternConfig",
    "PreferenceConfig",
    "QuantizationSettings",
    "Recipe",
    "RewardConfig",
    "RewardSpec",
    "RolloutConfig",
    "SFTConfig",
    "SampledPairsConfig",
    "ScoringConfig",
    "SourceConfig",
    "SyncedReference",
    "TrainerConfig",
    "WatchConfig",
]
