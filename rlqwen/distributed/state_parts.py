"""Save and read tensors of which each rank holds a part, each rank its own: torch.distributed.checkpoint over safetensors.

Nothing is pickled: the place of a part in the whole is in the header of its file. So another number of ranks reads them
too, each what it needs, and no rank ever holds a whole tensor.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rlqwen.errors import ConfigError

FILE_BYTES = 1024**3
"""Bytes of all ranks' parts in one file each, about; a rank copies its part of one file at a time."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What torch raises for files that it has not written."""


def save_parts(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Write the parts that this rank holds into `folder`; a plain tensor, which all have, is written once.

    Called on every rank with the same names; `group`: a process group of all ranks. If a rank fails, such as by a full disk,
    its error is raised on all.
    """
    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // FILE_BYTES
        size += tensor.nbytes
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, on its own use of its interfaces
            save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _first_failure(error) from None


def read_layout(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, whole but without memory; ConfigError if it was not written by `save_parts`."""
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        entries: dict[str, Any] = dict(metadata.state_dict_metadata)
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
        }
    except _UNREADABLE as error:
        raise ConfigError(f"{folder} does not hold an optimizer's state: {error}") from error


def read_parts(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Fill tensors by name, whole ones or of which this rank holds a part; called on every rank, `group` as in `save_parts`.

    Raises ConfigError if parts are missing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=group,
                no_dist=group is None,
            )
    except (CheckpointException, *_UNREADABLE) as error:
        failure = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise ConfigError(f"{folder} does not hold a whole optimizer's state: {failure}") from None


def _first_failure(error: CheckpointException) -> Exception:
    """Return the error of the first rank that failed, such as one of a full disk; torch's own is no Exception."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, Exception) else OSError(str(failure))
