"""Check recipes that run one after the other; a later one may use what an earlier one will train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import OnlineConfig, Recipe
from rlqwen.data import first_rows, load_rows
from rlqwen.distributed.adamw import require_8bit
from rlqwen.errors import ModelError, ResourceError
from rlqwen.models.model_classes import check_weights
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_check import check_model, check_model_path
from rlqwen.preflight.recipe_check import check_memory, check_recipe
from rlqwen.preflight.resource_check import check_resources
from rlqwen.preflight.reward_check import check_reward_columns, resolve_rewards
from rlqwen.preflight.run_check import check_best_metric, run_checks
from rlqwen.preflight.run_folder_check import check_run_folder
from rlqwen.run_folder.layout import FINAL_FOLDER

Row = dict[str, Any]


def check_pipeline(recipes: Sequence[Recipe], *, gpu_gib: float | None = None, num_ranks: int = 1) -> list[CheckReport]:
    """Check everything about each recipe that needs no device.

    `gpu_gib`: memory of each GPU, None: as this machine's. `num_ranks`: ranks that each recipe will be trained by.
    """
    reports = []
    for place, recipe in enumerate(recipes):
        earlier = recipes[:place]
        start = starting_model(recipe, earlier)
        report = check_recipe(recipe, start, to_train=models_to_train(earlier), gpu_gib=gpu_gib, num_ranks=num_ranks)
        with report.collecting():
            check_run_folder(recipe, earlier)
        with report.collecting():
            _check_other_models(recipe, earlier)
        reports.append(report)
    return reports


def starting_model(recipe: Recipe, earlier: Sequence[Recipe]) -> Recipe:
    """Return the recipe whose model exists already: an earlier one that this one continues from, or itself."""
    for place, before in enumerate(earlier):
        if Path(recipe.model.path) == Path(before.output_dir) / FINAL_FOLDER:
            return starting_model(before, earlier[:place])
    return recipe


def models_to_train(earlier: Sequence[Recipe]) -> list[str]:
    """Return the folders of the models that earlier recipes will write."""
    return [str(Path(before.output_dir) / FINAL_FOLDER) for before in earlier]


def check_before_run(recipes: Sequence[Recipe], *, num_ranks: int = 1, ignore_memory: bool = False) -> None:
    """Check what is quick to find and expensive to find late; raise the first fault of any stage.

    A trainer makes the other checks itself before it trains, but a later stage's trainer is built only when the earlier
    stages are done. `num_ranks`: that each stage is trained by. `ignore_memory`: do not compare the memory plans with this
    machine's GPUs.
    """
    for place, recipe in enumerate(recipes):
        earlier = recipes[:place]
        check_run_folder(recipe, earlier)
        for check in run_checks(recipe):
            check()
        require_8bit(recipe.train)
        if starting_model(recipe, earlier) is recipe:
            check_model_path(recipe.model.path)
            check_model(recipe.model, scalar=recipe.train.trains_scalar_model)
        _check_other_models(recipe, earlier)
        if isinstance(recipe.train, OnlineConfig):
            check_resources(recipe.train.rollout)
        if not ignore_memory:
            _check_memory(recipe, earlier, num_ranks)
        for sampled in recipe.data.sampled_sources():
            check_resources(sampled.rollout)
            resolve_rewards(sampled.rewards)
        check_best_metric(recipe, None)
        if place and recipe.rewards:
            rewards = resolve_rewards([spec for spec in recipe.rewards if spec.name not in models_to_train(earlier)])
            rows = first_rows(recipe.data) if recipe.data.is_streamed else _training_rows(recipe)
            check_reward_columns(rewards, rows, "data.train")


def _check_memory(recipe: Recipe, earlier: Sequence[Recipe], num_ranks: int) -> None:
    try:
        check_memory(recipe, starting_model(recipe, earlier), num_ranks=num_ranks)
    except ResourceError as fault:
        raise ResourceError(f"{fault}. The plan may be too careful: --ignore-memory runs all the same") from None


def _training_rows(recipe: Recipe) -> Sequence[Row]:
    return load_rows(recipe.data.train, seed=recipe.data.mixing_seed, cache_dir=recipe.data.cache_dir)


def _check_other_models(recipe: Recipe, earlier: Sequence[Recipe]) -> None:
    """Raise ModelError for a reference or a teacher that neither is there nor will be trained by an earlier recipe."""
    for key, path in recipe.train.other_models().items():
        if path not in models_to_train(earlier):
            check_model_path(path, f"train.{key}")
            try:
                check_weights(path, scalar=key.startswith("critic"))
            except ModelError as error:
                raise ModelError(f"train.{key}: {error}") from None
