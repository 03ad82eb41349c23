"""The run folder and its checkpoints: what is written, how it is kept whole, and how a run goes on from it."""

from rlqwen.checkpoint.atomic_folder import find_fault, is_storage_error, sync_file
from rlqwen.checkpoint.checkpoints import (
    Retention,
    checkpoint_folder,
    complete_checkpoints,
    require_complete,
    restore_weights,
    save_model,
    set_aside,
    write_checkpoint,
)
from rlqwen.checkpoint.rng_state import random_state, restore_random_state, same_random_state
from rlqwen.checkpoint.state_files import read_values, write_values
from rlqwen.run_folder.lifecycle import cut_back, open_run_folder

__all__ = [
    "Retention",
    "checkpoint_folder",
    "complete_checkpoints",
    "cut_back",
    "find_fault",
    "is_storage_error",
    "open_run_folder",
    "random_state",
    "read_values",
    "require_complete",
    "restore_random_state",
    "restore_weights",
    "same_random_state",
    "save_model",
    "set_aside",
    "sync_file",
    "write_checkpoint",
    "write_values",
]
