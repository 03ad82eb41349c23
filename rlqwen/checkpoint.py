"""The run folder and its checkpoints: a checkpoint is complete or it is not there.

A checkpoint is written beside its place, synced to disk, and renamed. It holds the model as `from_pretrained` loads
it, the tokenizer, the adapter where there is one, and `trainer_state.json`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlqwen.errors import ConfigError
from rlqwen.metrics.run_folder import RUN_FILES, refuse_used_folder
from rlqwen.packed_model import PackedModel

STATE_FILE = "trainer_state.json"


def open_run_folder(output_dir: str | None, default_name: str, *, overwrite: bool) -> Path:
    """Make the run folder, or refuse one that holds a run; without `output_dir`, a new one under `runs/`.

    Nothing is deleted here: that waits until training begins, after everything else has been found right.
    """
    if output_dir is None:
        folder, number = Path("runs") / default_name, 1
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{default_name}-{number}"
    else:
        folder = Path(output_dir)
        refuse_used_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {str(folder)!r} cannot be written to: {error.strerror}") from error
    return folder


def clear_run_folder(folder: Path) -> None:
    """Delete what a run left there."""
    for path in (folder / name for name in RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_model(folder: Path, policy: PackedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write model and tokenizer (and the adapter, under `adapter/`) in the dtype that the model came in."""
    return _write(folder, policy, tokenizer, dtype=policy.original_dtype)


def save_checkpoint(
    folder: Path,
    policy: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    save_beside: Callable[[Path], None],
) -> Path:
    """Write a checkpoint to `folder`, replacing one that is there; trained weights keep their full precision.

    `save_beside` writes what else belongs to it into the folder that it is given.
    """
    return _write(folder, policy, tokenizer, state=state, save_beside=save_beside)


def _write(
    folder: Path,
    policy: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype | None = None,
    state: dict[str, Any] | None = None,
    save_beside: Callable[[Path], None] | None = None,
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    policy.save(partial, dtype=dtype)
    tokenizer.save_pretrained(partial)
    if policy.has_adapter:
        policy.save_adapter(partial / "adapter")
    if save_beside is not None:
        save_beside(partial)
    if state is not None:
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(folder.parent)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore_weights(folder: Path, policy: PackedModel) -> None:
    """Load the trained weights of a checkpoint back into `policy`."""
    policy.restore(folder / "adapter" if policy.has_adapter else folder)


def drop_old_checkpoints(folder: Path, *, limit: int | None, keep: Path | None) -> None:
    """Keep the newest `limit` checkpoints of `folder` (None: all), and `keep`, the best, whatever its age."""
    if limit is None:
        return
    for step in sorted(folder.glob("step-*"))[:-limit]:
        if step != keep:
            shutil.rmtree(step)
