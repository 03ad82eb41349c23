"""Check that a recipe may use its run folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import Recipe
from rlqwen.run_folder.layout import FINAL_FOLDER, refuse_needed_inside, refuse_unmarked, refuse_used_folder

_NOT_NEEDED = ("output_dir", "resume_from_checkpoint", "run_name", "cache_dir")
"""Keys whose values may lie inside the run folder."""


def check_run_folder(recipe: Recipe, earlier: Sequence[Recipe] = ()) -> None:
    """Raise ConfigError if the folder holds another run, or if moving a run away would move files of no run or files
    that this recipe needs; `earlier` recipes may not move those away either."""
    refuse_used_folder(recipe.output_dir, overwrite=recipe.reuses_folder)
    needed = dict(_paths(recipe.model_dump(mode="json")))
    if _clears(recipe):
        refuse_unmarked(recipe.output_dir)
        refuse_needed_inside(recipe.output_dir, needed)
    to_train = [Path(before.output_dir) / FINAL_FOLDER for before in earlier]
    there = {key: name for key, name in needed.items() if Path(name) not in to_train}
    for before in earlier:
        if _clears(before):
            refuse_needed_inside(before.output_dir, there)


def _clears(recipe: Recipe) -> bool:
    return recipe.train.overwrite_output_dir and not recipe.train.resume_from_checkpoint


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, string) for every string of a config; for `file.py:function`, the file."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NOT_NEEDED:
                yield from _paths(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _paths(inner, f"{key}.{place}")
    elif isinstance(value, str) and 0 < len(value) < 4096 and "\n" not in value and "\0" not in value:
        yield key, value.rpartition(":")[0] if ".py:" in value else value
