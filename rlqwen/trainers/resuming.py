"""How a run goes on from a checkpoint: the checkpoint chosen, changes refused, everything put back as it was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState

from rlqwen.checkpoint import (
    complete_checkpoints,
    cut_back,
    read_values,
    require_complete,
    restore_random_state,
    restore_weights,
    set_aside,
)
from rlqwen.checkpoint.fingerprint import differences
from rlqwen.errors import ConfigError
from rlqwen.run_folder.layout import WRITTEN_BY_EVALUATION, move_run_aside, refuse_used_folder
from rlqwen.trainers.saving import ORIGIN, PROGRESS, RANDOM, STATE_FILE, Saving


class Resuming(Saving):
    """The part of a trainer that reads checkpoints."""

    _changes: list[str] = []  # noqa: RUF012 - replaced, never changed

    def _choose_checkpoint(self, resume: bool | str | Path | None) -> Path | None:
        """Return the checkpoint to resume from, complete and verified; None to begin, with an old run moved aside.

        For the main rank alone.
        """
        resume = self.args.resume_from_checkpoint if resume is None else resume
        chosen: Path | None = None
        if resume and resume is not True and resume != "auto":
            chosen = require_complete(Path(resume))
            if not _can_go_on(chosen):
                raise ConfigError(
                    f"resume_from_checkpoint: {str(chosen)!r} holds the model alone (save_only_model), and nothing to go "
                    "on from; start a new run with it as model.path"
                )
        elif resume:
            chosen = next(self._usable_checkpoints(), None)
            if chosen is None and resume is True:
                raise ConfigError(
                    f"there is no complete checkpoint in {str(self.output_dir)!r} to go on from: start without resuming "
                    "(train.overwrite_output_dir=true moves what is there aside), or set resume: auto in the recipe to "
                    "begin where there is none"
                )
        overwrite = self.args.overwrite_output_dir or (resume == "auto" and chosen is None)
        if chosen is None or not chosen.resolve().is_relative_to(self.output_dir.resolve()):
            # The constructor has refused what others left there, unless there were checkpoints to go on from.
            refuse_used_folder(self.output_dir, overwrite=overwrite, apart_from=WRITTEN_BY_EVALUATION)
        if chosen is None and overwrite:
            aside = move_run_aside(self.output_dir)
            if aside is not None:
                self._note(f"the run that was in {self.output_dir} is in {aside} now")
        return chosen

    def _usable_checkpoints(self) -> Iterator[Path]:
        for folder in complete_checkpoints(self.output_dir, self._note):
            if _can_go_on(folder):
                yield folder
            else:
                self._note(f"checkpoint {folder} is not used: it holds the model alone (save_only_model)")

    def _refuse_changes(self, checkpoint: Path) -> None:
        """ConfigError that lists what has changed since the checkpoint, unless that is allowed."""
        self._changes = changes = differences(read_values(checkpoint, ORIGIN), self.origin())
        if not changes:
            return
        if not self.args.resume_allow_changes:
            raise ConfigError(
                "\n  ".join(
                    [
                        f"cannot go on from {str(checkpoint)!r}, because the result would not be that of one run:",
                        *changes,
                    ]
                )
                + "\nundo the changes, or accept them with --allow-changes (train.resume_allow_changes=true)"
            )
        for change in changes:
            self._note(f"going on in spite of a change: {change}")

    def _restore(self, checkpoint: Path) -> None:
        """Put back everything but the random states, which come last, and cut the run folder back."""
        progress = self._put_back(checkpoint)
        step = self.state.global_step
        self._resumed = [*self._resumed, {"from": str(checkpoint), "step": step, "changes": self._changes}]
        self._note(f"going on after update {step}, from {checkpoint}")
        if self.ranks.is_main and self._is_own(checkpoint):
            cut_back(self.output_dir, step=step, metrics_bytes=progress["metrics_bytes"])
        self.ranks.barrier()

    def _put_back(self, checkpoint: Path) -> dict[str, Any]:
        """Put weights, optimizer and progress back, and set aside what the run saved after that; returns the progress."""
        self._restore_state(json.loads((checkpoint / STATE_FILE).read_text("utf-8")))
        progress = read_values(checkpoint, PROGRESS)
        restore_weights(checkpoint, self.policy)
        self.restore_beside(checkpoint)
        self.optimizer.restore(checkpoint)
        self.restore_progress(progress)
        self.after_restore()
        self._saved_step = self.state.global_step
        if self.ranks.is_main and self._is_own(checkpoint):
            for later in set_aside(self.output_dir, after=self._saved_step):
                self._note(f"{later.name} was not gone on from; it is in {later.parent / 'set-aside'} now")
        self.ranks.barrier()
        return progress

    def _is_own(self, checkpoint: Path) -> bool:
        """Whether it lies in the run folder."""
        return checkpoint.resolve().is_relative_to(self.output_dir.resolve())

    def _restore_state(self, saved: dict[str, Any]) -> None:
        """Into the state that there is, which others hold on to."""
        max_steps = self.state.max_steps
        for name, value in saved.items():
            setattr(self.state, name, value)
        self.state.max_steps = max_steps
        best = self.state.best_model_checkpoint
        if best is not None and (here := self.output_dir / "checkpoints" / Path(best).name).is_dir():
            self.state.best_model_checkpoint = str(here)
        for callback in self.callbacks:
            states: Any = self.state.stateful_callbacks
            kept = states.get(type(callback).__name__)
            if kept and isinstance(callback, ExportableState):
                for name, value in kept["attributes"].items():
                    setattr(callback, name, value)

    def _restore_random_state(self, checkpoint: Path) -> None:
        """Each rank its own; one that had none, in a run of fewer ranks, begins as it would anew."""
        name = f"{RANDOM}-{self.ranks.rank}"
        if (checkpoint / f"{name}.json").is_file():
            restore_random_state(read_values(checkpoint, name))


def _can_go_on(checkpoint: Path) -> bool:
    return (checkpoint / f"{PROGRESS}.json").is_file()
