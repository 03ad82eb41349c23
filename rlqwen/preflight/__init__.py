"""Find what is wrong with a recipe without a device: small checks that trainers use too, and `rlqwen check`."""

from rlqwen.config.batch_plan import BatchPlan, plan_batch, prompt_room, refuse_stream
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_check import check_model_path
from rlqwen.preflight.pipeline_check import check_before_run, check_pipeline
from rlqwen.preflight.recipe_check import check_recipe
from rlqwen.preflight.resource_check import check_resources

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
