"""Save a run to `checkpoints/step-NNNNNN` of its folder, and restore it."""

import copy
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlqwen.checkpoint import (
    Retention,
    archive_checkpoints,
    checkpoint_folder,
    find_fault,
    get_rng_state,
    preserve_rng_state,
    read_state,
    set_rng_state,
    sync_file,
    truncate_run_folder,
    usable_checkpoints,
    write_checkpoint,
    write_state,
)
from rlqwen.checkpoint.resumable import STATE
from rlqwen.checkpoint.state_files import refusing_foreign_state
from rlqwen.config import OnlineConfig, Recipe
from rlqwen.config.recipe_yaml import write_resolved
from rlqwen.distributed import OptimizerStep
from rlqwen.errors import ConfigError, RlqwenError
from rlqwen.models.packed_model import PackedModel
from rlqwen.run_folder.layout import METRICS_FILE, RECIPE_FILE, is_inside
from rlqwen.trainers.resume import FINGERPRINT, RNG
from rlqwen.trainers.run_context import RunContext

TRAINER_STATE_FILE = "trainer_state.json"


class Stateful(Protocol):
    """A part of a trainer whose state is JSON values and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; called on the main rank only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; called on every rank."""
        ...


class Saveable(Protocol):
    """A part of a trainer that writes files of its own into a checkpoint, such as a model."""

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write into `folder`; called on every rank, one of which is to `write`."""
        ...

    def load_checkpoint(self, folder: Path) -> None:
        """Read back what `save_checkpoint` wrote; called on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class StepState:
    """State at the beginning of a step, beside weights and optimizer, which its first update changes."""

    global_step: int
    parts: dict[str, Any]
    rng: dict[str, Any]


class Checkpointer:
    """Write complete checkpoints, drop old ones, and put everything back from one."""

    def __init__(
        self,
        run: RunContext,
        *,
        models: Mapping[str, Saveable],
        optimizer: OptimizerStep,
        parts: Mapping[str, Stateful],
        processing_class: PreTrainedTokenizerBase,
        fingerprint: dict[str, Any],
        recipe: Recipe | None,
    ) -> None:
        """Take the parts of a trainer.

        Args:
            models: by the subfolder of the checkpoint that each writes to; `""` is the checkpoint's own folder.
            parts: by name; their states go into one file.
            fingerprint: what the result depends on; saved beside the state.
        """
        self.saved_step = -1
        """Update of the newest checkpoint that this process wrote or restored."""
        self.saved_at = time.monotonic()
        """When it was written."""
        self.output_dir = run.output_dir
        self._args, self._ranks, self._state = run.args, run.ranks, run.state
        self._callbacks, self._logger = run.callbacks, run.logger
        self._models = models
        self._optimizer = optimizer
        self._parts = parts
        self._processing_class = processing_class
        self._fingerprint = fingerprint
        self._recipe = recipe
        self._begun: StepState | None = None
        """What `save` writes in place of the present state of the parts."""

    # Saving

    def remember_step(self) -> StepState | None:
        """Return the state of the parts before a step, from which a step that fails while it samples can be saved.

        None if nothing is sampled, or ahead of the step: those groups are lost with the workers.
        """
        if not isinstance(self._args, OnlineConfig) or self._args.rollout.max_staleness > 0:
            return None
        states = {name: part.state_dict() for name, part in self._parts.items()} if self._ranks.is_main else {}
        return StepState(self._state.global_step, copy.deepcopy(states), get_rng_state())

    def save_begun_step(self, begun: StepState | None, error: RlqwenError) -> str:
        """Write a checkpoint of the beginning of a step that failed with `error`; return why there is none, or nothing."""
        if begun is None and isinstance(self._args, OnlineConfig):
            return "groups that were sampled ahead (rollout.max_staleness) are lost with the workers"
        if begun is None or begun.global_step != self._state.global_step:
            return f"the step had begun to change the weights, by update {self._state.global_step}"
        if not begun.global_step:
            return "no update was made yet"
        if self._ranks.world_size > 1 and not error.is_on_all_ranks:
            return "the ranks are not at the same place"
        self._begun = begun
        try:
            self.save()
        finally:
            self._begun = None
        return ""

    def save(self, *, best: bool = False) -> None:
        """Write the checkpoint of the last update if it is not there, and drop old ones as `save_total_limit` says."""
        folder = checkpoint_folder(self.output_dir, self._state.global_step)
        if best:
            self._state.best_model_checkpoint = str(folder)
        if self.saved_step != self._state.global_step:
            if self._ranks.is_main:
                sync_file(
                    self.output_dir / METRICS_FILE
                )  # its size is in the checkpoint, so it must survive a power cut
            with preserve_rng_state():
                write_checkpoint(folder, self._fill, self._ranks)
            self.saved_step, self.saved_at = self._state.global_step, time.monotonic()
            self._callbacks.notify("on_save")
        if self._ranks.is_main:
            kept = self._state.best_model_checkpoint
            retention = Retention(self._args.save_total_limit, self._args.save_keep_every)
            retention.drop_old(folder.parent, best=Path(kept) if kept else None)

    def _fill(self, folder: Path) -> None:
        """Write the files of a checkpoint; called on every rank, and each file is written by one."""
        is_main = self._ranks.is_main
        for name, model in self._models.items():
            model.save_checkpoint(folder / name, write=is_main)
        if is_main:
            self._processing_class.save_pretrained(folder)
            (folder / TRAINER_STATE_FILE).write_text(json.dumps(asdict(self._state), indent=1) + "\n", "utf-8")
            if self._recipe is not None:
                write_resolved(self._recipe, folder / RECIPE_FILE)
        if self._args.save_only_model or self._args.parallel.autotp_size > 1:
            return
        if is_main:
            states = (
                self._begun.parts if self._begun else {name: part.state_dict() for name, part in self._parts.items()}
            )
            write_state(folder, STATE, states)
            write_state(folder, FINGERPRINT, self._fingerprint)
        self._optimizer.save_checkpoint(folder)
        write_state(folder, f"{RNG}-{self._ranks.rank}", self._begun.rng if self._begun else get_rng_state())

    # Restoring

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint of the run folder, the same on every rank; None if there is none."""
        found = next(usable_checkpoints(self.output_dir, self._logger.note), None) if self._ranks.is_main else None
        return self._ranks.from_main(found)

    def restore(self, checkpoint: Path, *, keep: Collection[str] = ()) -> None:
        """Restore models, optimizer and parts, except the parts named in `keep`, and archive later checkpoints.

        Random states come last, by `restore_rng_state`, when nothing else is to be built.
        """
        with refusing_foreign_state(checkpoint):
            self._restore_trainer_state(json.loads((checkpoint / TRAINER_STATE_FILE).read_text("utf-8")))
            states = read_state(checkpoint, STATE)
            for name, model in self._models.items():
                model.load_checkpoint(checkpoint / name)
            self._optimizer.load_checkpoint(checkpoint)
            for name, part in self._parts.items():
                if name not in keep:
                    part.load_state_dict(states[name])
        self.saved_step = self._state.global_step
        if self._ranks.is_main and self._is_own(checkpoint):
            for later in archive_checkpoints(self.output_dir, after=self.saved_step):
                self._logger.note(f"{later.name} was not gone on from; it is in {later.parent / 'set-aside'} now")
        self._ranks.barrier()

    def load_best(self, model: PackedModel) -> bool:
        """Load the weights of the best checkpoint into `model`; return whether there is a complete one."""
        if not self._state.best_model_checkpoint:
            return False
        folder = Path(self._state.best_model_checkpoint)
        fault = find_fault(folder)
        if fault is not None:
            self._logger.note(
                f"the best checkpoint {folder} cannot be gone back to, and the last weights are kept: {fault}"
            )
            return False
        model.load_checkpoint(folder)
        return True

    def truncate_run_folder(self, checkpoint: Path) -> None:
        """Delete metrics and completions of later updates, if the checkpoint lies in this run folder."""
        if self._ranks.is_main and self._is_own(checkpoint):
            with refusing_foreign_state(checkpoint):
                metrics_bytes = int(read_state(checkpoint, STATE)["logger"]["metrics_bytes"])
            truncate_run_folder(self.output_dir, step=self._state.global_step, metrics_bytes=metrics_bytes)
        self._ranks.barrier()

    def restore_rng_state(self, checkpoint: Path) -> None:
        """Restore each rank's own random state; ranks added since the checkpoint keep their fresh seed."""
        name = f"{RNG}-{self._ranks.rank}"
        if (checkpoint / f"{name}.json").is_file():
            with refusing_foreign_state(checkpoint):
                set_rng_state(read_state(checkpoint, name))

    def _is_own(self, checkpoint: Path) -> bool:
        return is_inside(checkpoint, self.output_dir)

    def _restore_trainer_state(self, saved: dict[str, Any]) -> None:
        """Update the state in place, because callbacks and loggers keep references to it."""
        max_steps = self._state.max_steps
        known = {field.name for field in fields(self._state)}
        if not known.issuperset(saved) or not isinstance(saved.get("global_step"), int):
            raise ConfigError(f"{TRAINER_STATE_FILE} is none of rlqwen's: it holds {', '.join(map(str, saved)):.200}")
        for name, value in saved.items():
            setattr(self._state, name, value)
        self._state.max_steps = max_steps
        best = self._state.best_model_checkpoint
        if best is not None and (here := self.output_dir / "checkpoints" / Path(best).name).is_dir():
            self._state.best_model_checkpoint = str(here)
