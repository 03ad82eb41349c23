"""Find settings of a recipe that its model does not allow, on a model without weights."""

from typing import TYPE_CHECKING

from rlqwen.config import OnlineConfig, Recipe, RolloutConfig
from rlqwen.distributed.tensor_parallel import check_shardable
from rlqwen.models.moe_balance import RouterBalance
from rlqwen.models.packed_model import check_cuttable
from rlqwen.packing.forward import packing_obstacle
from rlqwen.packing.sequence_parallel import check_heads
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.parameter_counts import chosen_experts
from rlqwen.rollout.engine import engine_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_settings(report: CheckReport, recipe: Recipe, facts: ConfigFacts, model: "PreTrainedModel") -> None:
    """Add to the report each setting that the model does not allow; `model` is built from `facts.config`, without
    weights."""
    train = recipe.train
    parallel = train.parallel
    if obstacle := packing_obstacle(facts.config):
        report.warnings.append(f"{obstacle}: sequences are forwarded one after another, each with its prompt again")
    with report.collecting():
        check_heads(facts.config, parallel.sequence_parallel_size)
        check_cuttable(facts.config, parallel.sequence_parallel_size)
    if parallel.autotp_size > 1 and recipe.model.lora is None:
        with report.collecting():
            check_shardable(model, parallel.autotp_size)
    with report.collecting():
        RouterBalance(model, train.router_aux_loss_coef)
    if isinstance(train, OnlineConfig) and train.rollout.routing_replay:
        with report.collecting():
            _, experts = chosen_experts(facts.config.get_text_config())
            RolloutConfig.check_experts(recipe.model.path, experts)


def check_rollout_dtype(report: CheckReport, recipe: Recipe, facts: ConfigFacts) -> None:
    """Add to the report the dtype that vLLM's kernels need where it is not the trainer's, or a fault where they have none.

    A cluster (`ray_address`) is not checked, nor is a model on the hub.
    """
    train = recipe.train
    if not isinstance(train, OnlineConfig) or facts.folder is None or train.rollout.ray_address is not None:
        return
    compute_dtype = "bfloat16" if train.bf16 else "float16" if train.fp16 else "float32"  # of a trainer on CPU
    with report.collecting():
        _, note = engine_class(train.rollout).choose_dtype(train.rollout, facts.path, compute_dtype)
        report.facts += [("rollout dtype", note)] if note else []
