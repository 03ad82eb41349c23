"""Read rows from local files, each with its origin (file and line or row number) for error messages."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlqwen.data.plain_values import without_filling
from rlqwen.errors import DataError

Row = dict[str, Any]
SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

WHOLE_BYTES = 1 << 25
"""Size above which a JSON file is read in parts."""
_PART_CHARACTERS = 1 << 20
_BLANKS = re.compile(r"\s*")
_PARQUET_ROWS = 512
"""Number of Parquet rows that are converted to Python objects at a time."""
_EXCERPT = 60
_FIELD_LIMIT = 2**31 - 1


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row of a file, or of all data files of a folder, sorted by name.

    `where` is text such as `train.jsonl, line 3` (lines count from 1) or `train.parquet, row 2` (rows count from 0).
    Raises DataError for content that cannot be read, with its position and an excerpt.
    """
    for file in data_files(path):
        empty = True
        for where, row in _READERS[file.suffix.lower()](file):
            empty = False
            yield where, row
        if empty:
            raise DataError(f"{file} holds no rows")


def data_files(path: Path) -> list[Path]:
    """Return the data files at `path`; raise DataError, with the content of the folder, if there are none."""
    if not path.is_dir():
        if not path.is_file():
            raise DataError(
                f"{path} is neither a file nor a folder, but a pipe, a socket or a device: write the rows to a file"
            )
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: can't read files of type {path.suffix!r}; known types: {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"no data file ({', '.join(SUFFIXES)}) in folder {path}; {list_folder(path)}")
    return files


def list_folder(folder: Path) -> str:
    """Describe the content of a folder for messages: `it holds: a, b, c`."""
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(raw, where).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}): {_excerpt(line)}"
                ) from None
            except (ValueError, RecursionError) as error:  # integers with thousands of digits, or deep nesting
                raise DataError(f"{where}: cannot be read as JSON ({error}): {_excerpt(line)}") from None
            yield where, _require_mapping(row, where)


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    done = 0
    if path.stat().st_size > WHOLE_BYTES:
        if _holds_lines(path):
            yield from _read_jsonl(path)
            return
        try:
            for row in _elements(path):
                yield f"{path}, row {done}", _require_mapping(row, f"{path}, row {done}")
                done += 1
            return
        except (ValueError, RecursionError):
            pass  # reading the file as a whole raises an error with the line, or supports its format
    for number, row_with_origin in enumerate(_read_whole_json(path)):
        if number >= done:
            yield row_with_origin


def _holds_lines(path: Path) -> bool:
    """Return whether the first line is a complete JSON object; a line that begins with a list is not read."""
    with path.open("rb") as file:
        if not file.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
        try:
            return isinstance(json.loads(file.readline()), dict)
        except (ValueError, RecursionError):
            return False


def _elements(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list, with only a part of the file in memory; raise ValueError for other files."""
    decoder, text, start = json.JSONDecoder(), "", 0
    wanted, may_end = "[", False
    with path.open(encoding="utf-8-sig") as file:
        while True:
            start = _skip_blanks(text, start)
            found = text[start : start + 1]
            if found == "]" and may_end:
                if (text[start + 1 :] + file.read()).strip():
                    raise ValueError("text after the list")
                return
            if found and wanted:
                if found != wanted:
                    raise ValueError(f"no {wanted!r}")
                may_end = wanted == "["
                wanted, start = "", start + 1
                continue
            try:
                element, start = decoder.raw_decode(text, start)
            except ValueError:
                rest = text[start:]
                more = file.read(
                    max(_PART_CHARACTERS, len(rest))
                )  # double the text, so that long elements need few reads
                if not more:
                    raise
                text, start = rest + more, 0
                continue
            yield element
            wanted, may_end = ",", True


def _skip_blanks(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    return match.end() if match else start


def _read_whole_json(path: Path) -> Iterator[tuple[str, Row]]:
    text = _decode(path.read_bytes(), str(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines in a .json file, as in many hub datasets
            yield from _read_jsonl(path)
            return
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}): {_excerpt(line)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if isinstance(rows, dict) and "\n" not in text.strip():  # JSON Lines with a single line
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path}: a JSON data file must hold a list of objects, this one holds {_kind(rows)}")
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        yield where, _require_mapping(row, where)


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield rows of a CSV file; every value stays text, because `007` is not the number 7."""
    csv.field_size_limit(_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _csv_rows(path, csv.DictReader(file, strict=True))


def _csv_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[str, Row]]:
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
        except UnicodeDecodeError:
            _decode(path.read_bytes(), str(path))  # raises a DataError with the line
            raise
        if row is None:
            return
        where = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            expected = len(reader.fieldnames or ())
            raise DataError(
                f"{where}: the header names {expected} columns, this row has {'more' if None in row else 'fewer'}; "
                "values with a comma or a line break need double quotes"
            )
        yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.lib
    import pyarrow.parquet

    # A damaged length may ask for any memory, and a damaged name of a column may be no text.
    damaged = (pyarrow.lib.ArrowException, OSError, MemoryError, UnicodeDecodeError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except damaged as error:
        raise DataError(f"{path}: not a valid Parquet file ({error})") from None
    batches = file.iter_batches(_PARQUET_ROWS)
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except damaged as error:
            raise DataError(f"{path}: cannot be read from row {number} on ({error})") from None
        if batch is None:
            return
        for row in _python_rows(batch, f"{path}, row", number):
            yield f"{path}, row {number}", without_filling(row, file.schema_arrow)
            number += 1


def _python_rows(batch: Any, where: str, number: int) -> list[Row]:
    """Return the rows of an Arrow batch; raise DataError that names the row and column of text that is not UTF-8."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as whole:
        for place in range(len(batch)):
            for column in batch.schema.names:
                try:
                    batch.column(column)[place].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where} {number + place}: column {column!r} is not valid UTF-8 (byte 0x{error.object[error.start]:02x} "
                        f"at offset {error.start}); write the file anew from valid text"
                    ) from None
        raise DataError(f"{where} {number}: not valid UTF-8 ({whole})") from None
    except (ValueError, OverflowError, ArithmeticError) as error:  # dates before year 1, for example
        raise DataError(f"{where} {number} or one of the next {len(batch) - 1}: {error}") from None


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        where = where if ", line " in where else f"{where}, line {line}"
        raise DataError(
            f"{where}: not valid UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); "
            "convert the file, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def _require_mapping(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, this is {_kind(row)}: {_excerpt(json.dumps(row))}")
    return row


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


_READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
