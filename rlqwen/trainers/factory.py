"""Build the trainer of a recipe."""

from typing import Any

from rlqwen.config import ModelConfig, Recipe
from rlqwen.config.algorithms import trainer_class
from rlqwen.data import RecipeData, load_recipe_data
from rlqwen.models.adapters import lora_config
from rlqwen.models.quantization import bitsandbytes_config
from rlqwen.rewards import build_rewards
from rlqwen.trainers.base import Trainer


def build_trainer(recipe: Recipe) -> Trainer[Any, Any, Any]:
    """Load the recipe's data and model into the trainer of its algorithm; raise InputError for faults in either."""
    data = load_recipe_data(recipe.data)
    trainer = _build(recipe, data)
    trainer.cleaning = data.cleaning
    trainer.recipe = recipe
    return trainer


def _build(recipe: Recipe, data: RecipeData) -> Trainer[Any, Any, Any]:
    args = recipe.train.model_copy(
        update={
            "model_init_kwargs": model_arguments(recipe.model) | recipe.train.model_init_kwargs,
            "trust_remote_code": recipe.model.trust_remote_code,
        }
    )
    shared: dict[str, Any] = {
        "train_dataset": data.train,
        "eval_dataset": data.eval,
        "peft_config": lora_config(recipe.model.lora) if recipe.model.lora else None,
    }
    if recipe.rewards:
        args = args.model_copy(update={"reward_weights": [spec.weight for spec in recipe.rewards]})
        shared["reward_funcs"] = build_rewards(
            [spec.name for spec in recipe.rewards], [spec.args for spec in recipe.rewards]
        )
    trainer: Trainer[Any, Any, Any] = trainer_class(recipe.algorithm)(recipe.model.path, args=args, **shared)
    return trainer


def model_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that the recipe's `model` section sets."""
    arguments = dict(model.init_kwargs)
    if model.dtype != "auto":
        arguments["dtype"] = model.dtype
    if model.revision is not None:
        arguments["revision"] = model.revision
    if model.quantization is not None:
        arguments["quantization_config"] = bitsandbytes_config(model.quantization)
    return arguments
