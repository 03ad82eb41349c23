"""Run recipes in order, and leave every run folder complete."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rlqwen.config import Recipe
from rlqwen.errors import InputError
from rlqwen.metrics import plot_pipeline, refuse_used_folder, write_pipeline_summary
from rlqwen.metrics.report import pipeline_folder
from rlqwen.metrics.run_folder import ERROR_FILE, RECIPE_FILE
from rlqwen.pairs import sample_pairs
from rlqwen.recipe import write_resolved
from rlqwen.secrets import redact


def run_pipeline(recipes: Sequence[Recipe], announce: Callable[[str], None]) -> list[Path]:
    """Train each recipe in turn; returns the run folders. `announce` is told of each stage where there are
    several, and of what is sampled before one.

    Run folders that share a parent leave a summary and the curves of all stages in that parent too.

    Raises ConfigError before anything is trained if one of the run folders holds a run that may not be overwritten.
    """
    for recipe in recipes:
        refuse_used_folder(recipe.output_dir, overwrite=recipe.train.overwrite_output_dir)
    run_dirs = []
    for place, recipe in enumerate(recipes):
        if len(recipes) > 1:
            announce(f"stage {place + 1} of {len(recipes)}: {recipe.algorithm} in {recipe.output_dir}")
        run_dirs.append(run_recipe(recipe, announce))
    parent = pipeline_folder(run_dirs)
    if parent:
        write_pipeline_summary(parent, run_dirs)
        plot_pipeline(parent, run_dirs)
    return run_dirs


def run_recipe(recipe: Recipe, announce: Callable[[str], None]) -> Path:
    """Train one recipe; returns its run folder, which holds `error.log` if it failed for no fault of the input."""
    from rlqwen.trainers.build import build_trainer

    try:
        trainer = build_trainer(sample_pairs(recipe, announce))
        write_resolved(recipe, trainer.output_dir / RECIPE_FILE)
        trainer.train()
    except InputError:
        raise
    except Exception:
        folder = Path(recipe.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).write_text(redact(traceback.format_exc()), encoding="utf-8")
        raise
    return Path(trainer.output_dir)
