"""What lies in a run folder, and the refusal to write over a run."""

from pathlib import Path

from rlqwen.errors import ConfigError

RECIPE_FILE = "recipe.yaml"
FINAL_FOLDER = "final"
ERROR_FILE = "error.log"
RUN_FILES = (
    "metrics.jsonl",
    "completions",
    "checkpoints",
    FINAL_FOLDER,
    "summary.json",
    "nonfinite",
    "reward_failures",
    "data_cleaning.json",
    "data_dropped.jsonl",
)
"""What only a run that began leaves behind."""


def refuse_used_folder(path: str | Path, *, overwrite: bool) -> None:
    """Raises ConfigError if the folder holds a run and may not be overwritten."""
    found = [name for name in RUN_FILES if (Path(path) / name).exists()]
    if found and not overwrite:
        raise ConfigError(
            f"output_dir {str(path)!r} holds a run already (found {', '.join(found)}): choose another folder, "
            "or set train.overwrite_output_dir=true to delete that run and start anew"
        )
