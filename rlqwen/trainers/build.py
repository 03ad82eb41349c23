"""From a recipe to the trainer that carries it out."""

from typing import Any

from peft import LoraConfig

from rlqwen.config import LoraSettings, ModelConfig, Recipe
from rlqwen.data import load_rows
from rlqwen.quantization import bitsandbytes_config
from rlqwen.scoring import build_rewards
from rlqwen.trainers.base import BaseTrainer
from rlqwen.trainers.grpo import GRPOTrainer
from rlqwen.trainers.sft import SFTTrainer


def build_trainer(recipe: Recipe) -> BaseTrainer[Any, Any]:
    """Load the recipe's data and model; everything that is wrong with either is an InputError."""
    args = recipe.train.model_copy(
        update={
            "model_init_kwargs": model_arguments(recipe.model) | recipe.train.model_init_kwargs,
            "trust_remote_code": recipe.model.trust_remote_code,
        }
    )
    train_rows = load_rows(recipe.data.train, seed=recipe.data.mixing_seed)
    eval_rows = load_rows(recipe.data.eval, seed=recipe.data.mixing_seed) if recipe.data.eval else None
    shared: dict[str, Any] = {
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "peft_config": lora_config(recipe.model.lora) if recipe.model.lora else None,
    }
    if recipe.algorithm == "sft":
        return SFTTrainer(recipe.model.path, args, **shared)
    args = args.model_copy(update={"reward_weights": [spec.weight for spec in recipe.rewards]})
    rewards = build_rewards([spec.name for spec in recipe.rewards], [spec.args for spec in recipe.rewards])
    return GRPOTrainer(recipe.model.path, rewards, args, **shared)


def model_arguments(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    arguments = dict(model.init_kwargs)
    if model.dtype != "auto":
        arguments["dtype"] = model.dtype
    if model.revision is not None:
        arguments["revision"] = model.revision
    if model.quantization is not None:
        arguments["quantization_config"] = bitsandbytes_config(model.quantization)
    return arguments


def lora_config(settings: LoraSettings) -> LoraConfig:
    """PEFT's config of a recipe's `model.lora`."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        **settings.model_dump() | {"lora_alpha": settings.lora_alpha or 2 * settings.r},
    )
