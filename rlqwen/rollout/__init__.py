"""Completions from the policy: vLLM engines in Ray actors, or plain sampling in the trainer's process."""

from rlqwen.rollout.engine import RolloutEngine, build_engine
from rlqwen.rollout.resources import WorkerResources, plan_workers

__all__ = ["RolloutEngine", "WorkerResources", "build_engine", "plan_workers"]
