"""Plan a run before it costs anything: memory, time and the layout of its GPUs, for any model and without its weights."""

from rlqwen.planning.made_plan import MadePlan, make_plan

__all__ = ["MadePlan", "make_plan"]
