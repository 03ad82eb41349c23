"""Find the checkpoints of a run that a run can go on from."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.checkpoint.checkpoints import complete_checkpoints, folders_of
from rlqwen.errors import ConfigError
from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER

STATE = "state"
_STATE_OF_0_1 = "progress.json"


def usable_checkpoints(output_dir: Path, note: Callable[[str], None]) -> Iterator[Path]:
    """Yield the checkpoints of a run folder that a run can resume from, newest first; note why others are left out."""
    for folder in complete_checkpoints(output_dir, note):
        if why := _why_not_resumable(folder):
            note(f"checkpoint {folder} is not used: it {why}")
        else:
            yield folder


def require_resumable(folder: Path, *, digests: bool = True) -> Path:
    """Return the checkpoint that a user named; raise ConfigError if a run cannot go on from it.

    `digests`: compare the content of its files with what was saved, not only their sizes.
    """
    if not folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint: there is no checkpoint {str(folder)!r}")
    if fault := find_fault(folder, digests=digests):
        raise ConfigError(
            f"resume_from_checkpoint: checkpoint {str(folder)!r} cannot be used: {fault}; name another, or use true for "
            "the newest complete one"
        )
    if why := _why_not_resumable(folder):
        raise ConfigError(f"resume_from_checkpoint: {str(folder)!r} {why}; start a new run with it as model.path")
    return folder


def no_checkpoint(output_dir: Path) -> ConfigError:
    """Return the error of a run that is to resume and has nothing to go on from."""
    return ConfigError(
        f"there is no complete checkpoint in {str(output_dir)!r} to go on from: start without resuming "
        "(train.overwrite_output_dir=true moves what is there aside), or set resume: auto in the recipe to "
        "begin where there is none"
    )


def check_resumable(resume: bool | str | None, output_dir: Path) -> None:
    """Raise ConfigError if `resume_from_checkpoint` names nothing to go on from; files are not read as a whole."""
    if resume is True:
        folders = folders_of(output_dir / CHECKPOINTS_FOLDER)
        if not any(find_fault(folder, digests=False) is None for folder in reversed(folders)):
            raise no_checkpoint(output_dir)
    elif resume and resume != "auto":
        require_resumable(Path(resume), digests=False)


def _why_not_resumable(checkpoint: Path) -> str | None:
    if (checkpoint / f"{STATE}.json").is_file():
        return None
    if (checkpoint / _STATE_OF_0_1).is_file():
        return "was written by rlqwen 0.1, whose training state this version cannot read"
    return "holds the model alone (save_only_model), and nothing to go on from"
