"""What can be found wrong without a device: small checks that trainers use too, and `rlqwen check` over a recipe."""

from rlqwen.check.arithmetic import BatchPlan, plan_batch, prompt_room, refuse_stream
from rlqwen.check.model import check_model_path
from rlqwen.check.pipeline import check_before_run, check_pipeline
from rlqwen.check.recipe import check_recipe
from rlqwen.check.report import CheckReport
from rlqwen.check.resources import check_resources

__all__ = [
    "BatchPlan",
    "CheckReport",
    "check_before_run",
    "check_model_path",
    "check_pipeline",
    "check_recipe",
    "check_resources",
    "plan_batch",
    "prompt_room",
    "refuse_stream",
]
