"""Store many normalized rows on disk, and normalize the rows of a script's dataset on access."""

import base64
import datetime
import decimal
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from rlqwen.data.arrow_file import ArrowRows, write_batches
from rlqwen.data.data_cache import cache_root, disk_errors_as_config_errors, move_file_into_cache, scratch_folder
from rlqwen.data.formats import normalize_row
from rlqwen.data.plain_values import without_filling
from rlqwen.data.views import Joined, Overlaid, Selected, View
from rlqwen.errors import DataError

Row = dict[str, Any]

STORED_FROM = 1000
"""Smallest number of rows that are stored on disk; fewer rows stay in memory, which is faster."""
BATCH = 512
_TAG = "__rlqwen_type__"


class RowCodec:
    """Store one JSON text per row, because Arrow columns would add missing keys and cannot mix types."""

    schema: ClassVar[pa.Schema] = pa.schema([("row", pa.large_binary())])

    def encode(self, items: Sequence[Row]) -> pa.RecordBatch:
        return self.batch([encode_row(row) for row in items])

    def batch(self, texts: Sequence[bytes]) -> pa.RecordBatch:
        """Return a batch of rows that are already encoded as JSON."""
        return pa.record_batch([pa.array(texts, pa.large_binary())], schema=self.schema)

    def decode(self, batch: pa.RecordBatch, index: int) -> Row:
        text: bytes = batch.column(0)[index].as_py()
        row: Row = json.loads(
            text.decode("utf-8", "surrogatepass"), object_hook=_untag if _TAG.encode() in text else None
        )
        return row


def encode_row(row: Row) -> bytes:
    """Encode a row as JSON; raise TypeError for a value that could not be read back."""
    return json.dumps(row, ensure_ascii=False, default=_tag).encode("utf-8", "surrogatepass")


def _tag(value: Any) -> dict[str, Any]:
    """Encode a value of a type that Parquet has and JSON does not."""
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, decimal.Decimal):
        return {_TAG: "Decimal", "value": str(value)}
    if isinstance(value, datetime.timedelta):
        return {_TAG: "timedelta", "value": [value.days, value.seconds, value.microseconds]}
    for kind in (datetime.datetime, datetime.date, datetime.time):
        if type(value) is kind:
            return {_TAG: kind.__name__, "value": value.isoformat()}
    raise TypeError(f"a value of type {type(value).__name__}")


def _untag(value: dict[str, Any]) -> Any:
    if _TAG not in value:
        return value
    kind, inner = value[_TAG], value["value"]
    if kind == "bytes":
        return base64.b64decode(inner)
    if kind == "Decimal":
        return decimal.Decimal(inner)
    if kind == "timedelta":
        return datetime.timedelta(*inner)
    return getattr(datetime, kind).fromisoformat(inner)


def store_rows(rows: Iterator[Row], cache_dir: str | Path | None = None) -> Sequence[Row]:
    """Return all rows of an iterator: few rows as a list, many as a cached Arrow file that is named by its content."""
    first = list(islice(rows, STORED_FROM))
    if len(first) < STORED_FROM:
        return first
    try:
        for row in first:
            encode_row(row)
    except TypeError:  # objects that a file cannot hold, such as images
        return [*first, *rows]
    root, codec, digest = cache_root(cache_dir), RowCodec(), hashlib.blake2b(digest_size=16)
    with disk_errors_as_config_errors(root), scratch_folder(root) as folder:
        written = folder / "rows.arrow"
        write_batches(written, codec.schema, map(codec.batch, _encoded(chain(first, rows), digest)))
        path = move_file_into_cache(written, root, f"rows-{digest.hexdigest()}.arrow")
        return ArrowRows(path, codec, digest.hexdigest())


def _encoded(rows: Iterable[Row], digest: Any) -> Iterator[list[bytes]]:
    """Yield JSON texts in batches, and update the digest with each text."""
    stream = iter(rows)
    while batch := list(islice(stream, BATCH)):
        texts = []
        for row in batch:
            try:
                texts.append(encode_row(row))
            except TypeError as error:
                raise DataError(f"{error} cannot be stored on disk, in row {row!r:.200}; drop that column") from None
            digest.update(b"%d:" % len(texts[-1]) + texts[-1])
        yield texts


class GivenRows(View[Row]):
    """View a script's sequence of rows, normalized on access."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def item(self, number: int) -> Row:
        return normalize_row(self._raw(number), f"row {number}")

    def chunk(self, start: int, stop: int) -> list[Row]:
        """Return rows as they are in the data, not normalized."""
        return [self._raw(number) for number in range(start, stop)]

    def _raw(self, number: int) -> Row:
        row = self.data[number]
        if not isinstance(row, Mapping):
            raise DataError(f"row {number}: a row must be a dict, not {row!r:.80}")
        return dict(row)


class TableRows(GivenRows):
    """View the rows of a datasets.Dataset, read from its Arrow table."""

    def __init__(self, data: Any) -> None:
        super().__init__(data.with_format("arrow"))  # no decoding and no transforms

    def _raw(self, number: int) -> Row:
        return self.chunk(number, number + 1)[0]

    def chunk(self, start: int, stop: int) -> list[Row]:
        table = self.data[start:stop]
        return [without_filling(row, table.schema) for row in table.to_pylist()]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BATCH):
            for number, row in enumerate(self.chunk(start, min(start + BATCH, len(self))), start):
                yield normalize_row(row, f"row {number}")


def read_chunk(rows: Sequence[Row], start: int, stop: int) -> list[Row]:
    """Return some rows, normalized or as their source has them, whichever is cheaper."""
    return rows.chunk(start, stop) if isinstance(rows, GivenRows) else list(rows[start:stop])


def content_digest(rows: Sequence[Row]) -> str:
    """Return a digest of all rows in order; stored digests are reused if possible."""
    if isinstance(rows, ArrowRows):
        return rows.digest
    digest = hashlib.blake2b(type(rows).__name__.encode(), digest_size=16)
    if isinstance(rows, Selected):
        digest.update(content_digest(rows.rows).encode() + array("q", rows.indices).tobytes())
    elif isinstance(rows, Joined):
        digest.update("".join(map(content_digest, rows.parts)).encode())
    elif isinstance(rows, Overlaid):
        digest.update(content_digest(rows.rows).encode() + _encode_loosely(sorted(rows.changes.items())))
    else:
        for start in range(0, len(rows), BATCH):
            for row in read_chunk(rows, start, min(start + BATCH, len(rows))):
                digest.update(_encode_loosely(row) + b"\n")
    return digest.hexdigest()


def _encode_loosely(value: Any) -> bytes:
    """Encode any value for a digest; the result cannot be read back."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_replace_value)
    except TypeError:  # keys that JSON cannot have
        text = repr(value)
    return text.encode("utf-8", "surrogatepass")


def _replace_value(value: Any) -> Any:
    """Return the repr of a value, but a list for a numpy array, because its repr is shortened."""
    return value.tolist() if type(value).__module__ == "numpy" else repr(value)


def folder_of(rows: Sequence[Row]) -> Path | None:
    """Return the cache folder of the rows, also through views; None if they are not in a cache."""
    if isinstance(rows, ArrowRows):
        return rows.path.parent
    parts = rows.parts if isinstance(rows, Joined) else [rows.rows] if isinstance(rows, Selected | Overlaid) else []
    return next(filter(None, map(folder_of, parts)), None)
