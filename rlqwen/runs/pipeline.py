"""Run recipes in order, and leave every run folder complete."""

import contextlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rlqwen.config import Recipe
from rlqwen.config.recipe_yaml import write_resolved
from rlqwen.distributed import MainRank, Ranks
from rlqwen.errors import InputError, MainRankFailed, Preempted
from rlqwen.reporting import plot_pipeline, write_pipeline_summary
from rlqwen.reporting.end_of_run import pipeline_folder
from rlqwen.run_folder.layout import ERROR_FILE, KEPT_RECIPE, RECIPE_FILE, refuse_used_folder
from rlqwen.run_folder.lock import lock_run_folder, unlock_run_folder
from rlqwen.runs.pairs import sample_pairs
from rlqwen.runs.stages import Stage
from rlqwen.secrets import redact
from rlqwen.terminal import printable


def run_pipeline(
    recipes: Sequence[Recipe | Stage], announce: Callable[[str], None], ranks: Ranks | None = None
) -> list[Path]:
    """Train the recipes that are not finished, in order, and return all run folders.

    `announce` gets a line per stage if there are several, and a line per set of pairs that is sampled. If the run
    folders share a parent, a summary and the curves of all stages are written there too.

    Raises ConfigError before anything is trained if one of the run folders holds a run that may not be overwritten.
    """
    ranks = ranks or Ranks()
    stages = [one if isinstance(one, Stage) else Stage(one) for one in recipes]
    for stage in stages if ranks.is_main else ():
        if not stage.finished:
            refuse_used_folder(stage.recipe.output_dir, overwrite=stage.recipe.reuses_folder)
    run_dirs = []
    for place, stage in enumerate(stages):
        recipe = stage.recipe
        done = ", finished already" if stage.finished else ""
        if len(stages) > 1 or done:
            announce(f"stage {place + 1} of {len(stages)}: {recipe.algorithm} in {recipe.output_dir}{done}")
        run_dirs.append(Path(recipe.output_dir) if done else run_recipe(recipe, announce, ranks))
    parent = pipeline_folder(run_dirs)
    if parent and ranks.is_main:
        write_pipeline_summary(parent, run_dirs)
        plot_pipeline(parent, run_dirs)
    return run_dirs


def run_recipe(recipe: Recipe, announce: Callable[[str], None], ranks: Ranks | None = None) -> Path:
    """Train one recipe, and return its run folder; if it fails, but not for a fault of the input, write `error.log` there.

    Of several ranks only the main one samples pairs and writes into the folder.
    """
    from rlqwen.trainers.factory import build_trainer

    ranks = ranks or Ranks()
    folder = Path(recipe.output_dir)

    def prepare() -> Recipe:
        lock_run_folder(folder)
        return sample_pairs(recipe, announce)

    def write_recipe() -> None:
        path = trainer.output_dir / RECIPE_FILE
        if not path.is_file() or not recipe.train.resume_from_checkpoint:
            if path.is_file() and recipe.train.overwrite_output_dir:
                path.rename(trainer.output_dir / KEPT_RECIPE)
            write_resolved(recipe, path)

    try:
        trainer = build_trainer(MainRank(ranks).run(prepare))
        MainRank(ranks).run(write_recipe)
        trainer.train()
    except (InputError, Preempted, MainRankFailed):
        raise
    except Exception:
        suffix = f".rank{ranks.rank}" if ranks.rank else ""
        with contextlib.suppress(OSError):  # the disk may be what failed
            (folder / f"{ERROR_FILE}{suffix}").write_text(printable(redact(traceback.format_exc())), encoding="utf-8")
        raise
    finally:
        unlock_run_folder(folder)
    return Path(trainer.output_dir)
