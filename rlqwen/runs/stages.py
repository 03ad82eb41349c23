"""Decide which recipes of a pipeline are finished, which one resumes from a checkpoint, and which begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlqwen.config import Recipe
from rlqwen.errors import ConfigError
from rlqwen.reporting.summary import read_summary
from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER, FINAL_FOLDER, find_run_files


@dataclass(frozen=True)
class Stage:
    """A recipe of a pipeline, and what to do with it."""

    recipe: Recipe
    """The recipe to run; it resumes from a checkpoint if there is one."""
    finished: bool = False
    """Whether its run folder is complete, so that it is skipped."""


def plan_stages(recipes: Sequence[Recipe], *, resume: bool = False, allow_changes: bool = False) -> list[Stage]:
    """Return what to do with each recipe.

    `resume` (`--resume`) skips recipes that are finished, resumes the one that was interrupted, and begins those after
    it; ConfigError if there is nothing to resume. `resume: auto` in a recipe does the same for that recipe, and begins
    it if there is nothing to resume.
    """
    stages = [_plan(recipe, resume, allow_changes) for recipe in recipes]
    if resume and not any(stage.finished or stage.recipe.train.resume_from_checkpoint for stage in stages):
        folders = ", ".join(repr(recipe.output_dir) for recipe in recipes)
        raise ConfigError(
            f"--resume: there is no checkpoint to go on from in {folders}; leave --resume out to begin, or set "
            "resume: auto in the recipe, which begins where there is none"
        )
    return stages


def _plan(recipe: Recipe, resume: bool, allow_changes: bool) -> Stage:
    if not (resume or recipe.resume == "auto"):
        return Stage(recipe)
    folder = Path(recipe.output_dir)
    if is_finished(folder):
        return Stage(recipe, finished=True)
    how: bool | str | None = recipe.train.resume_from_checkpoint
    if recipe.resume == "auto":
        how = how or "auto"
    elif (folder / CHECKPOINTS_FOLDER).is_dir():
        how = how or True
    elif found := find_run_files(folder):
        raise ConfigError(
            f"--resume: {recipe.output_dir!r} holds a run that ended before its first checkpoint (found "
            f"{', '.join(found)}): start it anew with train.overwrite_output_dir=true, or set resume: auto in the recipe; "
            "train.save_steps and train.save_minutes say how often checkpoints are written"
        )
    changes = {
        "resume_from_checkpoint": how,
        "resume_allow_changes": allow_changes or recipe.train.resume_allow_changes,
    }
    return Stage(recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)}))


def is_finished(folder: Path) -> bool:
    """Return whether a run has ended in `folder`: it writes `summary.json` last."""
    try:
        return bool(read_summary(folder)) and (folder / FINAL_FOLDER).is_dir()
    except (OSError, ValueError, RecursionError):
        return False
