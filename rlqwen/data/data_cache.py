"""Store rows and token ids in a cache on disk, atomically: they are written to a scratch folder, then renamed.

The name of a cache folder is a digest of everything its content depends on, so stale data is never found. Its
`meta.json` holds a digest of the Arrow file, so damaged data is never used. Several processes may share a cache: one
writes while the others wait.
"""

import contextlib
import errno
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlqwen.errors import ConfigError
from rlqwen.terminal import get_logger

logger = get_logger(__name__)

ROWS_FILE = "rows.arrow"
_META_FILE = "meta.json"
_SCRATCH = ".writing-"
_ABANDONED_S = 24 * 3600.0
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR),
}
_ADVICE = "set data.cache_dir in the recipe, or the environment variable RLQWEN_CACHE, to a folder with room"


def cache_root(given: str | Path | None = None) -> Path:
    """Return the folder for data: `given`, `data` in RLQWEN_CACHE, or `rlqwen` in the cache of the datasets library.

    Raises ConfigError if the folder cannot be written to.
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
    """Convert a disk error of the cache to a ConfigError that says how to fix it; raise other errors unchanged."""
    try:
        yield
    except OSError as error:
        if not _is_of_cache(error, root):
            raise
        raise ConfigError(f"the data cache {str(root)!r} cannot be written to ({error.strerror}): {_ADVICE}") from error


def _is_of_cache(error: OSError, root: Path) -> bool:
    """Return whether an error may come from writing to `root`; errors from Arrow have no file name."""
    if not isinstance(error.filename, str | bytes):
        return error.errno in _DISK_ERRORS
    path = Path(os.fsdecode(error.filename)).absolute()
    return path.is_relative_to(root.absolute()) or root.absolute().is_relative_to(path)


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """Create a folder in the cache and delete it at the end unless it was renamed; open files stay readable."""
    _remove_abandoned(root)
    private = Path(tempfile.mkdtemp(dir=root, prefix=_SCRATCH))
    folder = private / "data"  # with default permissions, because several users may share a cache
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Remove scratch folders of killed processes: those to which nothing was written for a day."""
    for folder in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < time.time() - _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold a file lock, so that one process works at a time; the system releases the lock of a dead process."""
    with (root / f".{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is tokenizing the same rows; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # the file system has no locks; two processes may then do the same work
        yield


def move_file_into_cache(written: Path, root: Path, name: str) -> Path:
    """Move a finished file to its name in the cache; keep an equal file that is there already."""
    path = root / name
    if not (path.is_file() and filecmp.cmp(written, path, shallow=False)):
        written.replace(path)
    return path


def move_folder_into_cache(written: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Move a folder with a finished Arrow file to its name in the cache; replace a damaged folder."""
    meta = meta | {"file": digest_file(written / ROWS_FILE)}
    (written / _META_FILE).write_text(json.dumps(meta), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read the metadata of a cache folder; return None, with a warning if it is damaged, if it cannot be used."""
    if not folder.is_dir():
        return None
    try:
        meta: dict[str, Any] = json.loads((folder / _META_FILE).read_text("utf-8"))
        if meta["file"] != digest_file(folder / ROWS_FILE):
            raise ValueError("its digest does not match")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): the rows are tokenized again", folder, error)
        return None
    return meta


def digest_file(path: Path) -> str:
    """Compute the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
