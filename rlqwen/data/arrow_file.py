"""Write Arrow files of rows in batches, map them into memory, and read one row at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from rlqwen.data.views import View

Item = TypeVar("Item")

TOKENS = pa.list_(pa.int32())
MASK = pa.list_(pa.bool_())


class Codec(Protocol[Item]):
    """Define a lossless conversion between items and the columns of an Arrow file."""

    schema: ClassVar[pa.Schema]

    def encode(self, items: Sequence[Item]) -> pa.RecordBatch: ...

    def decode(self, batch: pa.RecordBatch, index: int) -> Item: ...


class ArrowRows(View[Item], Generic[Item]):
    """View the items of an Arrow file; `digest` identifies their content.

    The file is memory-mapped, so the system may drop its pages from memory. It may be deleted or replaced while it is
    open. Raises ValueError or OSError for a file that cannot be read.
    """

    def __init__(self, path: Path, codec: Codec[Item], digest: str) -> None:
        self.path, self.codec, self.digest = path, codec, digest
        with pa.memory_map(str(path)) as source:  # buffers keep the mapping alive
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(codec.schema):
                raise ValueError(f"{path} has unexpected columns")
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def item(self, index: int) -> Item:
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self.codec.decode(self._batches[number], index - before)

    def __iter__(self) -> Iterator[Item]:
        for batch in self._batches:
            yield from (self.codec.decode(batch, index) for index in range(len(batch)))

    def column(self, name: str) -> Iterator[pa.Array]:
        """Yield the chunks of one column of the file."""
        return (batch.column(name) for batch in self._batches)


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file; only one batch is in memory at a time."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def list_at(column: Any, index: int) -> list[Any]:
    """Return the list of numbers or booleans in row `index` of a column."""
    values = column[index].values
    return values.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]
