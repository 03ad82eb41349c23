"""Proximal policy optimisation."""

from rlqwen.config.online import OnlineConfig


class PPOConfig(OnlineConfig):
    """Arguments of PPOTrainer."""
