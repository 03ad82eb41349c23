"""Move the reference towards the policy, and keep it in a checkpoint."""

from pathlib import Path
from typing import Self

from rlqwen.config import SyncedReference, TrainerConfig
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.policy import Policy
from rlqwen.trainers.schedule import Schedule


class MovingReference:
    """Mix the policy into its reference as `sync_ref_model` says, and save and restore the mixture."""

    def __init__(self, policy: Policy, args: SyncedReference) -> None:
        self._policy = policy
        self._args = args

    @classmethod
    def of(cls, model: PackedModel, args: TrainerConfig) -> Self | None:
        """Return the moving reference of a trainer's model; None if its reference stays, or if it has none."""
        if not isinstance(args, SyncedReference) or not args.sync_ref_model:
            return None
        assert isinstance(model, Policy)
        return cls(model, args)

    def refresh(self, schedule: Schedule, before: int) -> None:
        """Mix the policy in if that is due since update `before`."""
        if schedule.passes(self._args.ref_model_sync_steps, before):
            self._policy.refresh_reference(self._args.ref_model_mixup_alpha)

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write the reference into `folder`; call it on every rank, with `write` on one."""
        self._policy.save_reference(folder, write=write)

    def load_checkpoint(self, folder: Path) -> None:
        """Read back what `save_checkpoint` wrote."""
        self._policy.restore_reference(folder)
