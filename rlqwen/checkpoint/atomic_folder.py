"""Write a folder so that it is complete or absent: write it aside, list digests, sync to disk, rename.

`manifest.json` holds the sha256 and the size of every other file. All files are verified before a checkpoint is used;
files that the manifest does not list are never read.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlqwen.config.usable_values import real_path
from rlqwen.errors import SaveError

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
_STORAGE_WORDS = ("no space left", "disk quota", "read-only file system", "file too large", "input/output error")


def write_complete(folder: Path, fill: Callable[[Path], None], *, last_size: int | None = None) -> Path:
    """Call `fill` to write a folder aside, and replace `folder` by it once it is complete and on disk.

    `last_size`: bytes of the previous folder, for the message if there is no space. Raises SaveError if the disk is full
    or not writable; what was written is then removed.
    """
    partial = partial_folder(folder)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        partial.mkdir()
        fill(partial)
        write_manifest(partial)
        sync_tree(partial)
        put_in_place(partial, folder)
    except BaseException as error:
        if isinstance(error, Exception) and is_storage_error(error):
            message = describe_storage_error(error, partial, last_size)
            remove(partial)
            raise SaveError(f"{folder} cannot be saved: {message}") from error
        remove(partial)
        raise
    return folder


def partial_folder(folder: Path) -> Path:
    """Return the path at which `folder` is written before it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a complete folder to its final path. An existing folder there is moved aside first and deleted last."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_file(folder.parent)
    remove(old)


def write_manifest(folder: Path) -> None:
    """Write the manifest: the folder's files with sizes and digests."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST_FILE).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n", "utf-8")


def find_fault(folder: Path, *, digests: bool = True) -> str | None:
    """Say what is wrong with a folder that `write_complete` wrote, and in which file; None if nothing is.

    `digests`: compare the content of each file with its digest, not only its size.
    """
    try:
        manifest: Any = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, so it was never completed"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
    if manifest.get("format") != _FORMAT:
        return f"{MANIFEST_FILE} is of format {manifest.get('format')!r}, and this version reads {_FORMAT}"
    for name, (digest, size) in files.items():
        path = folder / name
        if not real_path(path).is_relative_to(real_path(folder)):
            return f"{MANIFEST_FILE} names {name!r}, which is outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, and had {size:,} when it was saved"
        if digests and _digest(path) != digest:
            return f"{name} has changed since it was saved (its sha256 differs)"
    return None


def total_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(folder: Path) -> None:
    """Delete a folder if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder in `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def sync_file(path: Path) -> None:
    """Sync a file or folder to disk if it exists."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_storage_error(error: BaseException) -> bool:
    """Return whether the disk is full or not writable; safetensors and tokenizers only say so in the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _STORAGE_ERRORS
    return any(word in str(error).lower() for word in _STORAGE_WORDS)


@contextlib.contextmanager
def explaining_storage_errors(folder: Path) -> Iterator[None]:
    """Raise SaveError, which names the run folder, instead of the system's error if the disk is full or not writable."""
    try:
        yield
    except OSError as error:
        if isinstance(error, SaveError) or not is_storage_error(error):
            raise
        raise SaveError(f"the run folder {folder} cannot be written to: {error}") from error


def describe_storage_error(error: BaseException, partial: Path, last_size: int | None) -> str:
    """Say what the system reports, how much was written and needed, and how much is free."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    written = 0
    with contextlib.suppress(OSError):
        written = total_bytes(partial)
    place = next((path for path in [partial, *partial.parents] if path.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    needed = f"; the last checkpoint took {last_size / 1e6:,.1f} MB" if last_size else ""
    return (
        f"{reason}. {written / 1e6:,.1f} MB were written, {free / 1e6:,.1f} MB are free{needed}. "
        "The incomplete checkpoint is removed and earlier ones are kept: free some space (save_total_limit keeps fewer "
        "checkpoints), and resume with `rlqwen run RECIPE --resume`"
    )
