"""Write checkpoints completely or not at all, verify them, and restore runs from them."""

from rlqwen.checkpoint.atomic_folder import explaining_storage_errors, find_fault, sync_file
from rlqwen.checkpoint.checkpoints import (
    Retention,
    archive_checkpoints,
    checkpoint_folder,
    complete_checkpoints,
    save_model,
    write_checkpoint,
)
from rlqwen.checkpoint.resumable import require_resumable, usable_checkpoints
from rlqwen.checkpoint.rng_state import get_rng_state, preserve_rng_state, set_rng_state
from rlqwen.checkpoint.state_files import read_state, write_state
from rlqwen.run_folder.lifecycle import open_run_folder, truncate_run_folder

__all__ = [
    "Retention",
    "archive_checkpoints",
    "checkpoint_folder",
    "complete_checkpoints",
    "explaining_storage_errors",
    "find_fault",
    "get_rng_state",
    "open_run_folder",
    "preserve_rng_state",
    "read_state",
    "require_resumable",
    "save_model",
    "set_rng_state",
    "sync_file",
    "truncate_run_folder",
    "usable_checkpoints",
    "write_checkpoint",
    "write_state",
]
