"""The guard that watches a run: symptoms in its metrics, what they mean, whom to tell. No torch."""

from rlqwen.watch.guard import Guard, Trip, worst_action
from rlqwen.watch.webhook import Webhook

__all__ = ["Guard", "Trip", "Webhook", "worst_action"]
