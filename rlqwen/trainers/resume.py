"""Choose the checkpoint that a run resumes from, and refuse changes that would make it another run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlqwen.checkpoint import read_state, require_resumable, usable_checkpoints
from rlqwen.checkpoint.fingerprint import diff_fingerprints
from rlqwen.checkpoint.resumable import no_checkpoint
from rlqwen.config import TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.run_folder.layout import WRITTEN_BY_EVALUATION, is_inside, move_run_aside, refuse_used_folder

FINGERPRINT = "fingerprint"
RNG = "rng"
Note = Callable[[str], None]


def choose_checkpoint(
    resume: bool | str | Path | None, args: TrainerConfig, output_dir: Path, note: Note
) -> Path | None:
    """Return the checkpoint to resume from, complete and verified; None to start, with an old run moved aside.

    Called on the main rank only. `resume`: as for `Trainer.train`; None: as the config says.
    """
    resume = args.resume_from_checkpoint if resume is None else resume
    chosen: Path | None = None
    if resume and resume is not True and resume != "auto":
        chosen = require_resumable(Path(resume))
    elif resume:
        chosen = next(usable_checkpoints(output_dir, note), None)
        if chosen is None and resume is True:
            raise no_checkpoint(output_dir)
    overwrite = args.overwrite_output_dir or (resume == "auto" and chosen is None)
    if chosen is None or not is_inside(chosen, output_dir):
        # The constructor has refused what others left there, unless there were checkpoints to resume from.
        refuse_used_folder(output_dir, overwrite=overwrite, apart_from=WRITTEN_BY_EVALUATION)
    if chosen is None and overwrite:
        aside = move_run_aside(output_dir)
        if aside is not None:
            note(f"the run that was in {output_dir} is in {aside} now")
    return chosen


def refuse_changes(checkpoint: Path, fingerprint: dict[str, Any], *, allowed: bool, note: Note) -> list[str]:
    """Return what changed since the checkpoint; raise ConfigError with the list unless that is `allowed`."""
    changes = diff_fingerprints(read_state(checkpoint, FINGERPRINT), fingerprint)
    if changes and not allowed:
        head = f"cannot go on from {str(checkpoint)!r}, because the result would not be that of one run:"
        tail = "undo the changes, or accept them with --allow-changes (train.resume_allow_changes=true)"
        raise ConfigError("\n  ".join([head, *changes]) + "\n" + tail)
    for change in changes:
        note(f"going on in spite of a change: {change}")
    return changes
