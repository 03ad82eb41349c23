"""The guard that watches a run: symptoms in its metrics, what they mean, whom to tell. No torch."""

from rlqwen.monitoring.monitor import Guard, Trip, worst_action
from rlqwen.monitoring.webhook import Webhook

__all__ = ["Guard", "Trip", "Webhook", "worst_action"]
