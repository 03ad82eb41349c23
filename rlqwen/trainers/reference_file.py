"""Keep the reference that follows the policy in a checkpoint."""

from pathlib import Path

from rlqwen.models.policy import Policy


class ReferenceFile:
    """Save and restore the weights of a reference that `sync_ref_model` changes."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def save_checkpoint(self, folder: Path, *, write: bool = True) -> None:
        """Write the reference into `folder`."""
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self._policy.save_reference(folder)

    def load_checkpoint(self, folder: Path) -> None:
        """Read back what `save_checkpoint` wrote."""
        self._policy.restore_reference(folder)
