"""Take the memory of a private Ray's object store when it starts, so that nobody else can take it later."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from rlqwen.errors import ResourceError
from rlqwen.rollout.resources import SHARED_MEMORY, ObjectStore


def take_room(store: ObjectStore, processes: Mapping[int, str], temporary_folder: Path) -> None:
    """Have the kernel reserve all of the store; raise ResourceError, with Ray ended, if there is no room for it any more.

    Ray only maps the store's file. If the file system filled up before a page was first written to, the kernel would kill
    the raylet, and Ray the trainer with it.

    Args:
        processes: process id -> name, of the private Ray.
        temporary_folder: Ray's, where a store on disk lies.
    """
    folder = temporary_folder if store.on_disk else SHARED_MEMORY
    raylets = [pid for pid, name in processes.items() if name == "raylet"]
    for path in (path for pid in raylets for path in Path(f"/proc/{pid}/fd").glob("*")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if _is_store(path, folder, store.num_bytes):
                _reserve(path, folder)


def _is_store(path: Path, folder: Path, num_bytes: int) -> bool:
    # Ray unlinks the file once it is open. It is slightly larger than what was asked for.
    return str(path.readlink()).startswith(f"{folder}/plasma") and path.stat().st_size >= num_bytes


def _reserve(path: Path, folder: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, size := os.fstat(descriptor).st_size)
    except OSError as error:
        import ray

        ray.shutdown()
        raise ResourceError(
            f"rollout: {size / 1e9:.3g} GB for the weights that workers are sent cannot be reserved in {folder}: "
            f"{error.strerror}; another program took the room meanwhile: free some, or start again"
        ) from error
    finally:
        os.close(descriptor)
