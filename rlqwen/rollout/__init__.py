"""Completions from the policy: vLLM engines in Ray actors, or plain sampling in the trainer's process."""

from rlqwen.rollout.engine import Engine, RolloutEngine, WorkerEngine, build_engine, engine_class
from rlqwen.rollout.resources import WorkerResources, plan_workers

__all__ = ["Engine", "RolloutEngine", "WorkerEngine", "WorkerResources", "build_engine", "engine_class", "plan_workers"]
