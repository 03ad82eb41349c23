"""The guard that watches a run: symptoms in its metrics, what they mean, whom to tell. No torch."""

from rlqwen.monitoring.monitor import Alert, Monitor, worst_action
from rlqwen.monitoring.webhook import Webhook

__all__ = ["Alert", "Monitor", "Webhook", "worst_action"]
