"""List the kinds of plugins, each with the entry point group that packages register it in."""

from rlqwen.errors import ConfigError, RewardSpecError
from rlqwen.plugins.registry import Registry

REWARDS = Registry("rlqwen.rewards", "reward", RewardSpecError)
LOSSES = Registry("rlqwen.losses", "loss", ConfigError)
NORMALIZERS = Registry("rlqwen.normalizers", "normalizer", ConfigError)
ADVANTAGES = Registry("rlqwen.advantages", "advantage estimator", ConfigError)
TRAINERS = Registry("rlqwen.trainers", "algorithm", ConfigError, kind="Class")
ENGINES = Registry("rlqwen.engines", "rollout engine", ConfigError, kind="Class")
