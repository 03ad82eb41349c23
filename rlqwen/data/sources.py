"""Load rows from the sources of a recipe or a script: files, folders, the hub, built-in generators, Python objects."""

import difflib
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rlqwen.config.data import SourceConfig
from rlqwen.data import rows_on_disk
from rlqwen.data.formats import add_system_prompt, normalize_row
from rlqwen.data.generated_rows import generate
from rlqwen.data.media import media_advice
from rlqwen.data.packaged_rows import PREFIX, bundled_file
from rlqwen.data.plain_values import without_filling
from rlqwen.data.row_files import SUFFIXES, list_folder, read_rows
from rlqwen.data.rows_on_disk import GivenRows, TableRows, store_rows
from rlqwen.data.streams import StreamedRows
from rlqwen.data.views import Joined, Selected, View
from rlqwen.errors import DataError
from rlqwen.models.hub import note_dataset
from rlqwen.terminal import get_logger

Row = dict[str, Any]
logger = get_logger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_rows(
    source: SourceConfig | list[SourceConfig], *, seed: int, cache_dir: str | Path | None = None
) -> Sequence[Row]:
    """Load and normalize (rlqwen.data.formats) all rows of a source, or of a mixture of sources.

    Many rows are written to an Arrow file in the data cache (`cache_dir`) and read from there on access.

    Sources without a `weight` are joined and interleaved. If a source has a weight, weights are proportions of the
    mixture: it is as large as possible without repeating a row, and the log says how many rows of each source it has.
    The same seed gives the same rows in the same order. Rows of one source keep their order. Raises DataError, with
    file and row, for content that cannot be read.
    """
    sources = source if isinstance(source, list) else [source]
    if not sources:
        raise DataError("data: an empty list of sources; give at least one")
    loaded = [_load_source(one, cache_dir) for one in sources]
    if len(loaded) == 1:
        return loaded[0]
    return _mix(sources, loaded, random.Random(seed))


def stream_rows(source: SourceConfig) -> StreamedRows:
    """Return the rows of a source as a stream; each row is normalized when it is read."""

    def begin(epoch: int) -> Iterator[tuple[str, Row]]:
        return islice(_read_source(source), source.limit)

    return StreamedRows(
        str(source.path or source.generator), begin, lambda number, one: prepare_row(one[1], source, one[0])
    )


def as_rows(data: Any) -> Sequence[Row]:
    """Return normalized rows of a script's dataset: a datasets.Dataset, or any sized sequence of dicts.

    Many rows are not copied, and are normalized on access. Raises DataError for a stream, a DatasetDict, or an empty
    dataset.
    """
    if isinstance(data, View):
        return data  # normalized already
    if isinstance(data, Mapping):
        raise DataError(f"a dataset with splits ({', '.join(map(str, data))}) was given; pass one, as dataset['train']")
    if hasattr(data, "iloc"):
        raise DataError(
            "a pandas table was given; pass datasets.Dataset.from_pandas(table, preserve_index=False), or "
            "table.to_dict('records')"
        )
    if isinstance(data, str | bytes) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"a dataset must be a datasets.Dataset or a list of dicts, not {type(data).__name__}; take some "
            "rows of a stream first: list(stream.take(10_000))"
        )
    if not len(data):
        raise DataError("the dataset is empty")
    is_table = hasattr(data, "to_list") and hasattr(data, "with_format")
    has_transform = is_table and (data.format or {}).get("type") == "custom"  # set by `set_transform`
    rows = TableRows(data) if is_table and not has_transform else GivenRows(data)
    return rows if len(rows) >= rows_on_disk.STORED_FROM else list(rows)


def read_source(source: SourceConfig) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each unprocessed row of a source; raise DataError for content that cannot be read."""
    return islice(_read_source(source), source.limit)


def prepare_row(row: Row, source: SourceConfig, where: str) -> Row:
    """Map the columns of a row, normalize it, and add the source's system prompt."""
    row = normalize_row(_map_columns(row, source.columns, where), where)
    return add_system_prompt(row, source.system_prompt, where) if source.system_prompt else row


def _load_source(source: SourceConfig, cache_dir: str | Path | None) -> Sequence[Row]:
    rows = store_rows((prepare_row(row, source, where) for where, row in read_source(source)), cache_dir)
    if not rows:
        raise DataError(f"{source.path or source.generator} holds no rows")
    return rows


def _read_source(source: SourceConfig) -> Iterator[tuple[str, Row]]:
    if source.generator is not None:
        return _numbered(generate(source.generator, source.args), f"generator {source.generator}")
    if source.sampled is not None:
        raise DataError(
            "these pairs have not been sampled yet: `rlqwen run` samples them, and `rlqwen data pairs` writes such pairs "
            "to a file"
        )
    assert source.path is not None  # SourceConfig holds exactly one of the three
    if source.args:
        raise DataError(f"{source.path}: 'args' are for a generator; a file or hub dataset takes none")
    if source.path.startswith(PREFIX):
        return read_rows(bundled_file(source.path))
    path = Path(source.path).expanduser()
    if not path.exists():
        if _looks_like_hub_id(path):
            return _read_hub(source)
        raise DataError(_missing(path))
    for key in ("name", "split", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"{path} is a local path: {key!r} is for hub datasets; give the path of the file instead")
    if (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} is a dataset with splits; give the folder of one split: {list_folder(path)}")
    if (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return _numbered(_table_rows(load_from_disk(str(path))), str(path))
    return read_rows(path)


def _read_hub(source: SourceConfig) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    assert source.path is not None
    split = source.split or "train"
    try:
        how = {"streaming": True} if source.streaming else {}
        dataset = load_dataset(source.path, source.name, split=split, revision=source.revision, **how)
    except Exception as error:  # the hub's client raises many types of errors
        raise DataError(
            f"{source.path} is not a local file or folder, and split {split!r} could not be loaded from the hub "
            f"({type(error).__name__}: {error})"
        ) from error
    note_dataset(source.path, dataset)
    return _numbered(_table_rows(dataset), source.path)


def _table_rows(dataset: Any) -> Iterator[Row]:
    schema = dataset.features.arrow_schema if getattr(dataset, "features", None) else None
    try:
        for row in dataset:
            yield without_filling(row, schema)
    except ImportError as error:  # no decoder for images
        raise DataError(f"rows of the data set hold media ({error}), {media_advice()}") from error


def _numbered(rows: Iterable[Any], where: str) -> Iterator[tuple[str, Row]]:
    return ((f"{where}, row {number}", dict(row)) for number, row in enumerate(rows))


def _looks_like_hub_id(path: Path) -> bool:
    """Return whether a path is `owner/name` or `name`, and neither a data file nor inside an existing folder."""
    is_local = len(path.parts) > 1 and path.parent.is_dir()
    return _HUB_ID.fullmatch(str(path)) is not None and path.suffix.lower() not in SUFFIXES and not is_local


def _missing(path: Path) -> str:
    """Describe a missing path, with the deepest folder that exists and its content."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no file or folder {path}; {hint}in {folder} {list_folder(folder)}"


def _map_columns(row: Row, columns: dict[str, str], where: str) -> Row:
    """Rename columns; `columns` maps our name to the data's, and a column may be mapped twice."""
    for ours, theirs in columns.items():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, map(str, row), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{where}: columns maps {ours!r} to {theirs!r}, which the row lacks{hint} "
                f"It has: {', '.join(map(str, row))}"
            )
    taken = set(columns.values())
    kept = {column: value for column, value in row.items() if column not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _mix(sources: Sequence[SourceConfig], loaded: Sequence[Sequence[Row]], rng: random.Random) -> Sequence[Row]:
    counts = [len(rows) for rows in loaded]
    if any(source.weight is not None for source in sources):
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        total = min(count / weight for count, weight in zip(counts, weights, strict=True))
        # The small addend keeps rounding errors from reducing a count such as 0.1 * 30 to 2.
        counts = [max(1, int(total * weight + 1e-9)) for weight in weights]
    queues = []
    starts = accumulate(map(len, loaded), initial=0)
    for source, rows, count, start in zip(sources, loaded, counts, starts, strict=False):
        logger.info("mixture: %d of %d rows of %s", count, len(rows), source.path or source.generator)
        queues.append(map(start.__add__, sorted(rng.sample(range(len(rows)), count))))
    order = array("q", (number for number, count in enumerate(counts) for _ in range(count)))
    rng.shuffle(order)
    mixed = Selected(Joined(loaded), array("q", (next(queues[number]) for number in order)))
    return mixed if len(mixed) >= rows_on_disk.STORED_FROM else list(mixed)
