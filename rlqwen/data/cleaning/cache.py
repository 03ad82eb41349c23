"""Cache outcomes of cleaning on disk, keyed by a digest of the input and verified by a digest of the content.

The key covers every row, the config and the code of the steps, so stale outcomes are never found. A file holds gzipped
JSON lines, with a header that has the digest of the rest. It is written to a temporary file and renamed.
"""

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

from rlqwen.config.cleaning import CleaningConfig
from rlqwen.data import duplicates
from rlqwen.data.cleaning.outcome import DroppedRow, MaskedRow, Outcome
from rlqwen.data.cleaning.texts import Row, canonical_json
from rlqwen.terminal import get_logger

logger = get_logger(__name__)

_OUTCOME_FILE = "outcome.jsonl.gz"


def cache_folder(rows: Sequence[Row], eval_rows: Sequence[Row] | None, config: CleaningConfig) -> Path:
    """Return the cache folder of the outcome for these rows and this config."""
    digest = hashlib.sha256(_code_digest().encode())
    digest.update(canonical_json(config.model_dump(exclude={"cache_dir"})).encode())
    for part in (rows, eval_rows or ()):
        digest.update(f"\n{len(part)} rows\n".encode())
        for row in part:
            digest.update(canonical_json(row).encode("utf-8", "surrogatepass") + b"\n")
    root = config.cache_dir or Path(os.environ.get("RLQWEN_CACHE") or "~/.cache/rlqwen") / "data"
    return Path(root).expanduser() / digest.hexdigest()[:32]


def load_outcome(folder: Path) -> Outcome | None:
    """Load the outcome from `folder`; return None if there is none, or, with a logged warning, if it is damaged."""
    path = folder / _OUTCOME_FILE
    if not path.is_file():
        return None
    try:
        header, _, payload = gzip.decompress(path.read_bytes()).partition(b"\n")
        if json.loads(header) != _header(folder, payload):
            raise ValueError("its digest does not match")
        return _parse(payload)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s): the data is cleaned again", path, error)
        return None


def store_outcome(folder: Path, outcome: Outcome) -> None:
    """Store the outcome; raise OSError if the folder cannot be written to."""
    lines = [{"masked": asdict(masked)} for masked in outcome.masked]
    lines += [{"dropped": asdict(dropped)} for dropped in outcome.dropped]
    payload = _json_lines(lines)
    content = _json_lines([_header(folder, payload)]) + payload
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / _OUTCOME_FILE, gzip.compress(content, compresslevel=5, mtime=0))


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically, through a temporary file in the same folder."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _json_lines(values: Iterable[object]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _header(folder: Path, payload: bytes) -> dict[str, str]:
    return {"key": folder.name, "sha256": hashlib.sha256(payload).hexdigest()}


def _parse(payload: bytes) -> Outcome:
    outcome = Outcome()
    for line in payload.splitlines():
        value = json.loads(line)
        if "masked" in value:
            outcome.masked.append(MaskedRow(**value["masked"]))
        else:
            outcome.dropped.append(DroppedRow(**value["dropped"]))
    return outcome


@cache
def _code_digest() -> str:
    """Return a digest of the code of the steps and the version of datasketch, so that changes invalidate the cache."""
    digest = hashlib.sha256(f"datasketch {version('datasketch')}".encode())
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(duplicates.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
