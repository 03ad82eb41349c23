"""Watch a run: find symptoms in its metrics, diagnose them, and raise alerts. Imports no torch."""

from rlqwen.monitoring.monitor import Alert, Monitor, worst_action
from rlqwen.monitoring.webhook import Webhook

__all__ = ["Alert", "Monitor", "Webhook", "worst_action"]
