"""Run a tokenization job over all rows: few rows in memory, many rows in parallel to a cached Arrow file."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from rlqwen.data import rows_on_disk
from rlqwen.data.arrow_file import ArrowRows, write_batches
from rlqwen.data.data_cache import (
    ROWS_FILE,
    cache_root,
    disk_errors_as_config_errors,
    locked,
    move_folder_into_cache,
    read_meta,
    scratch_folder,
)
from rlqwen.data.data_report import DataReport
from rlqwen.data.rows_on_disk import BATCH, content_digest, folder_of, read_chunk
from rlqwen.data.tokenization_job import TokenizationStats, TokenizingJob
from rlqwen.data.worker_pool import JobNotPicklable, WorkerPool
from rlqwen.errors import DataError
from rlqwen.terminal import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Item = TypeVar("Item")
logger = get_logger(__name__)

PARALLEL_FROM = 10_000
"""Smallest number of rows for several processes; fewer are finished before the processes have started."""
_PROGRESS_AFTER_S = 3.0


@dataclass(slots=True)
class Chunk:
    """Hold the result of a job for some rows, as it is sent between processes and written to disk."""

    batch: pa.RecordBatch
    stats: TokenizationStats
    faults: list[DataError] = field(default_factory=list)
    num_rows: int = 0


def run_chunk(job: TokenizingJob[Any], start: int, rows: Sequence[Row], collects_faults: bool) -> Chunk:
    """Run a job on some rows; raise the first error unless errors are collected."""
    faults: list[DataError] = []
    items, stats = job.run(start, rows, faults if collects_faults else None)
    return Chunk(job.codec.encode(items), stats, faults, len(rows))


def tokenize_all(
    rows: Sequence[Row],
    job: TokenizingJob[Item],
    *,
    faults: list[DataError] | None = None,
    num_proc: int | None = None,
) -> tuple[Sequence[Item], DataReport]:
    """Return the items of all rows in order, and a report; show a progress bar on a terminal if it takes long.

    `STORED_FROM` or more rows are written to an Arrow file in the data cache, which is reused for the same rows,
    tokenizer and settings. `num_proc`: number of processes; None: one, or one per CPU for very many rows. Raises the
    error of the first bad row; with a list `faults`, all errors are appended to it instead.
    """
    if not rows:
        raise DataError("the dataset is empty")
    if len(rows) < rows_on_disk.STORED_FROM:
        return _in_memory(rows, job, faults)
    root = cache_root(folder_of(rows))
    key = digest_of_job(rows, job)
    cached = root / f"tokens-{key}"
    with locked(root, f"tokens-{key}"):
        meta = read_meta(cached)
        if meta is not None:
            report = DataReport.from_dict(meta["report"])
            report.source = f"{len(rows):,} rows were tokenized before: read from {cached}"
            return job.present(_open(cached, job, meta), rows), report
        with disk_errors_as_config_errors(root), scratch_folder(root) as folder:
            digest, report = _write(folder / ROWS_FILE, rows, job, faults, num_proc)
            meta = {"digest": digest, "report": report.to_dict()}
            if faults:  # rows with errors are not worth caching
                return job.present(_open(folder, job, meta), rows), report
            move_folder_into_cache(folder, cached, meta)
    report.source = f"token ids are cached in {cached}"
    return job.present(_open(cached, job, meta), rows), report


def _open(folder: Path, job: TokenizingJob[Any], meta: dict[str, Any]) -> ArrowRows[Any]:
    return ArrowRows(folder / ROWS_FILE, job.codec, meta["digest"])


def _in_memory(
    rows: Sequence[Row], job: TokenizingJob[Item], faults: list[DataError] | None
) -> tuple[list[Item], DataReport]:
    total, items = TokenizationStats(), list[Item]()
    for start in range(0, len(rows), BATCH):
        made, stats = job.run(start, list(rows[start : start + BATCH]), faults)
        items += made
        total.add(stats)
    job.describe(total.report, rows)
    return items, job.finish(total, faults)


def _write(
    path: Path, rows: Sequence[Row], job: TokenizingJob[Any], faults: list[DataError] | None, num_proc: int | None
) -> tuple[str, DataReport]:
    """Write the Arrow file; return a digest of its content, and the report."""
    total, digest = TokenizationStats(), hashlib.blake2b(digest_size=16)

    def batches() -> Iterator[pa.RecordBatch]:
        for chunk in _chunks(rows, job, faults is not None, num_proc):
            total.add(chunk.stats)
            if faults is not None:
                faults.extend(chunk.faults)
            _feed(digest, chunk.batch)
            yield chunk.batch

    write_batches(path, job.codec.schema, batches())
    job.describe(total.report, rows)
    return digest.hexdigest(), job.finish(total, faults)


def _feed(digest: Any, batch: pa.RecordBatch) -> None:
    """Update the digest with values, because the bytes of a file may depend on the version of Arrow."""
    for column in batch.columns:
        digest.update(repr(column.type).encode())
        while pa.types.is_list(column.type):
            digest.update(column.value_lengths().to_numpy().tobytes())
            column = column.flatten()
        if column.null_count:
            digest.update(column.is_null().to_numpy(zero_copy_only=False).tobytes())
            column = column.drop_null()
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())


def _chunks(
    rows: Sequence[Row], job: TokenizingJob[Any], collects_faults: bool, num_proc: int | None
) -> Iterator[Chunk]:
    from tqdm import tqdm

    starts = range(0, len(rows), BATCH)
    parts = ((start, read_chunk(rows, start, min(start + BATCH, len(rows)))) for start in starts)
    count = min(count_processes(num_proc, len(rows)), len(starts))
    what = f"Tokenizing in {count} processes" if count > 1 else "Tokenizing"
    with tqdm(total=len(rows), desc=what, unit="row", delay=_PROGRESS_AFTER_S, disable=None) as bar:
        for chunk in _run_parts(parts, job, collects_faults, count):
            yield chunk
            bar.update(chunk.num_rows)


def _run_parts(
    parts: Iterator[tuple[int, list[Row]]], job: TokenizingJob[Any], collects_faults: bool, count: int
) -> Iterator[Chunk]:
    if count > 1:
        try:
            pool = WorkerPool(count, run_chunk, job, collects_faults)
        except JobNotPicklable as error:
            logger.warning("tokenizing in one process, because this tokenizer cannot be pickled (%s)", error)
        else:
            with closing(pool):
                yield from pool.map(parts)
            return
    yield from (run_chunk(job, start, part, collects_faults) for start, part in parts)


def digest_of_job(rows: Sequence[Row], job: TokenizingJob[Any]) -> str:
    """Compute the digest of everything that items depend on: rows, tokenizer, settings and this package's code."""
    parts = [type(job).__name__, job.settings(), content_digest(rows), digest_vocabulary(job.tokenizer), _code_digest()]
    return hashlib.blake2b(json.dumps(parts, default=repr).encode(), digest_size=16).hexdigest()


def digest_vocabulary(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Compute the digest of a tokenizer: vocabulary, merges, normalizer, added and special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(
        [
            backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
            type(tokenizer).__name__,
            sorted(tokenizer.added_tokens_decoder.items()),
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
        ],
        default=repr,
    )
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.blake2b("".join(f"{name} {version(name)}," for name in _LIBRARIES).encode(), digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_LIBRARIES = ("tokenizers", "transformers", "jinja2")


def count_processes(num_proc: int | None, num_rows: int) -> int:
    """Return the number of tokenizing processes; None: one per CPU if there are many rows.

    Only one rank tokenizes while the others wait, so it may use all CPUs.
    """
    if num_proc is not None:
        return num_proc
    if num_rows < PARALLEL_FROM:
        return 1
    return len(os.sched_getaffinity(0))
