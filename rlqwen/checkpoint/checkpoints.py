"""Write, find, verify and delete the checkpoints of a run, `checkpoints/step-NNNNNN`.

A checkpoint is a model folder for `from_pretrained` (trained weights in float32), with the tokenizer, the adapter under
`adapter/` if there is one, and what the trainer needs to resume.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlqwen.checkpoint.atomic_folder import (
    find_fault,
    partial_folder,
    put_in_place,
    remove,
    total_bytes,
    write_complete,
)
from rlqwen.distributed import Ranks
from rlqwen.models.packed_model import ADAPTER_FOLDER, PackedModel
from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER

_ARCHIVE = "set-aside"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint after update `step`."""
    return run_dir / CHECKPOINTS_FOLDER / f"step-{step:06d}"


def save_model(folder: Path, policy: PackedModel, tokenizer: PreTrainedTokenizerBase, *, write: bool = True) -> Path:
    """Write model and tokenizer (and the adapter, under `adapter/`) in the model's original dtype.

    Every rank must call this, one of them with `write`.
    """

    def fill(partial: Path) -> None:
        policy.save(partial, dtype=policy.original_dtype, write=write)
        if policy.has_adapter:
            policy.save_adapter(partial / ADAPTER_FOLDER, write=write)
        if write:
            tokenizer.save_pretrained(partial)

    if write:
        return write_complete(folder, fill)
    fill(folder)
    return folder


def write_checkpoint(folder: Path, fill: Callable[[Path], None], ranks: Ranks) -> None:
    """Write a checkpoint completely or not at all, replacing an existing one.

    Every rank calls `fill`, which must write different files on each rank; the main rank completes the folder.
    """

    def fill_together(partial: Path) -> None:
        ranks.barrier()
        fill(partial)
        ranks.barrier()

    if ranks.is_main:
        before = folders_of(folder.parent)
        write_complete(folder, fill_together, last_size=total_bytes(before[-1]) if before else None)
    else:
        fill_together(partial_folder(folder))
    ranks.barrier()


def complete_checkpoints(run_dir: Path, note: Callable[[str], None]) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, newest first, each verified when it is reached.

    `note` is called with a message for each checkpoint that is not complete.
    """
    for folder in reversed(folders_of(run_dir / CHECKPOINTS_FOLDER)):
        fault = find_fault(folder)
        if fault is None:
            yield folder
        else:
            note(f"checkpoint {folder} is not used: {fault}")


def archive_checkpoints(run_dir: Path, *, after: int) -> list[Path]:
    """Move checkpoints of updates later than `after`, which the resumed run writes again, to `checkpoints/set-aside`.

    Also delete what a killed save left. Return the paths that the moved checkpoints had.
    """
    parent = run_dir / CHECKPOINTS_FOLDER
    for partial in parent.glob(".step-*"):
        remove(partial)
    later = [folder for folder in folders_of(parent) if _step(folder) > after]
    for folder in later:
        (parent / _ARCHIVE).mkdir(exist_ok=True)
        put_in_place(folder, parent / _ARCHIVE / folder.name)
    return later


def folders_of(parent: Path) -> list[Path]:
    """Return the checkpoints in a folder, complete or not, oldest first."""
    return sorted((folder for folder in parent.glob("step-*") if folder.name[5:].isdigit()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


@dataclass(frozen=True)
class Retention:
    """Decide which checkpoints are kept."""

    limit: int | None
    """Number of newest checkpoints to keep; None: all."""
    keep_every: int | None
    """Checkpoints of updates that this number divides are kept forever, and do not count towards `limit`."""

    def drop_old(self, parent: Path, *, best: Path | None) -> None:
        """Delete checkpoints that need not be kept, but never `best`. A killed process leaves none half deleted."""
        if self.limit is None:
            return
        deletable = [
            folder for folder in folders_of(parent) if not (self.keep_every and _step(folder) % self.keep_every == 0)
        ]
        for folder in deletable[: -self.limit]:
            if folder != best:
                dropped = folder.with_name(f".{folder.name}.dropped")
                remove(dropped)
                folder.rename(dropped)
                remove(dropped)
