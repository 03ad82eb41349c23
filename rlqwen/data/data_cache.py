"""Where rows and token ids lie on disk, and how they get there whole: written beside their place, then renamed.

A folder's name is a digest of all that its content depends on, so nothing stale is ever found; its `meta.json` holds a
digest of the Arrow file, so nothing damaged is used. Several processes may share a cache: one writes, others wait.
"""

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlqwen.errors import ConfigError

logger = logging.getLogger(__name__)

ROWS_FILE = "rows.arrow"
_META_FILE = "meta.json"
_SCRATCH = ".writing-"
_ABANDONED_S = 24 * 3600.0
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR),
}
_MEND = "set data.cache_dir in the recipe, or the environment variable RLQWEN_CACHE, to a folder with room"


def cache_root(given: str | Path | None = None) -> Path:
    """Return the folder for data: `given`, `data` in RLQWEN_CACHE, or `rlqwen` beside the datasets library's cache.

    Raises ConfigError if it cannot be written to.
    """
    if given is None and os.environ.get("RLQWEN_CACHE"):
        given = Path(os.environ["RLQWEN_CACHE"]) / "data"
    if given is None:
        from datasets import config

        given = Path(config.HF_DATASETS_CACHE) / "rlqwen"
    root = Path(given).expanduser()
    with disk_errors_as_config_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root


@contextlib.contextmanager
def disk_errors_as_config_errors(root: Path) -> Iterator[None]:
    """Turn an error of the cache's disk into a ConfigError that says how to fix it; raise all others as they are."""
    try:
        yield
    except OSError as error:
        if not _is_of_cache(error, root):
            raise
        raise ConfigError(f"the data cache {str(root)!r} cannot be written to ({error.strerror}): {_MEND}") from error


def _is_of_cache(error: OSError, root: Path) -> bool:
    """Return whether an error may come from writing to `root`; errors from Arrow name no file."""
    if not isinstance(error.filename, str | bytes):
        return error.errno in _DISK_ERRORS
    place = Path(os.fsdecode(error.filename)).absolute()
    return place.is_relative_to(root.absolute()) or root.absolute().is_relative_to(place)


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """Make a folder in the cache, deleted at the end unless renamed; files that are open stay readable."""
    _remove_abandoned(root)
    private = Path(tempfile.mkdtemp(dir=root, prefix=_SCRATCH))
    folder = private / "data"  # with the usual rights, for a cache that several users share
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove the scratch folders of processes that were killed: those that nothing was written to for a day."""
    for folder in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < time.time() - _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold a lock, so that one process works at a time; the system frees the lock of a process that died."""
    with (root / f".{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is tokenizing the same rows; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: to do the work twice is better than not at all
        yield


def move_file_into_cache(written: Path, root: Path, name: str) -> Path:
    """Move a finished file to its name in the cache; if an equal file is there already, use that one."""
    place = root / name
    if not (place.is_file() and filecmp.cmp(written, place, shallow=False)):
        written.replace(place)
    return place


def move_folder_into_cache(written: Path, place: Path, meta: dict[str, Any]) -> None:
    """Move a folder with a finished Arrow file to its place in the cache; replace a damaged one."""
    meta = meta | {"file": digest_file(written / ROWS_FILE)}
    (written / _META_FILE).write_text(json.dumps(meta), "utf-8")
    shutil.rmtree(place, ignore_errors=True)
    written.rename(place)


def read_meta(place: Path) -> dict[str, Any] | None:
    """Read the metadata of a cache folder; None if it is missing or damaged (the log says so)."""
    if not place.is_dir():
        return None
    try:
        meta: dict[str, Any] = json.loads((place / _META_FILE).read_text("utf-8"))
        if meta["file"] != digest_file(place / ROWS_FILE):
            raise ValueError("its digest does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): the rows are tokenized anew", place, error)
        return None
    return meta


def digest_file(path: Path) -> str:
    """Compute the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
