"""Convert the values of a row to plain Python: without NaN, numpy, JSON in text, or nulls that Arrow has added."""

import ast
import json
import math
import re
from typing import Any

from rlqwen.data.message_keys import LOSS_KEYS, ROLES, THOUGHT_KEYS
from rlqwen.errors import DataError

Row = dict[str, Any]

_FILLED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "history")
_MAX_DEPTH = 100
"""Most levels of a value, which recursive functions of Python and of templates can follow."""
_NULLS_OF_PANDAS = ("NaTType", "NAType")
_MAY_BE_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*['\"]")
_BEGINS_AS_MESSAGES = re.compile(rf"\s*\[\s*\{{\s*['\"](role|from)['\"]\s*:\s*['\"]({'|'.join(ROLES)})['\"]")
_MESSAGE_KEYS = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call"}
_MESSAGE_KEYS |= {*LOSS_KEYS, *THOUGHT_KEYS}
_MAY_BE_NULL = ("default", "example")
"""Keys of a JSON schema whose value may be null."""
_BESIDE_A_NULL = {"type", "title", "description", "const"}
"""Keys that the schema of a property may have if the property must be null."""


def plain_row(row: Row, where: str) -> Row:
    """Copy a row; missing values become None, and numpy scalars and arrays become Python values.

    Missing values are NaN, NaT and NA of pandas tables, at any depth. Raises DataError for half a surrogate pair, and for
    more than 100 levels of lists and objects.
    """
    for column in row:
        _refuse_surrogates(str(column), where, ascii(column))
    plain = {column: plain_value(value, where, column) for column, value in row.items()}
    if any(type(value).__module__ == "numpy" and hasattr(value, "__len__") for value in row.values()):
        return without_filling(plain)  # pandas reads lists in a Parquet file as arrays
    return plain


def parse_messages(value: Any, where: str, column: str) -> Any:
    """Parse messages in a text of JSON or of Python literals; return other values and texts unchanged.

    Raises DataError for a text that begins like messages but cannot be parsed.
    """
    if not isinstance(value, str) or not _MAY_BE_MESSAGES.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        messages = found if isinstance(found, list) else [found]
        found = plain_value(found, where, column)
        return found if messages and all(map(_is_message, messages)) else value
    if _BEGINS_AS_MESSAGES.match(value):
        raise DataError(
            f"{where}: column {column!r} holds messages as text that is not valid JSON: {value[:80]!r}; write it as JSON"
        )
    return value


def _is_message(value: Any) -> bool:
    """Return whether an object is a message, rather than a prompt or an answer that happens to be JSON."""
    return (
        isinstance(value, dict)
        and _MESSAGE_KEYS.issuperset(value)
        and str(value.get("role") or value.get("from")) in ROLES
        and not {"content", "value", "tool_calls"}.isdisjoint(value)
    )


def without_filling(row: Row, schema: Any = None) -> Row:
    """Return a row of an Arrow table without the nulls that Arrow adds to give all objects the same fields.

    Only messages and tools are changed, because a tool call with one argument would otherwise show the arguments of
    all other tools. Some nulls in a tool's schema are kept because they have a meaning: `default` and `example` of a
    property that may be null and is not required, or whose field is null in the whole table, and a `const` without
    other constraints. `schema`: the table's pyarrow.Schema.
    """
    cleaned = {column: _without_nones(value) if column in _FILLED else value for column, value in row.items()}
    if isinstance(row.get("tools"), list | tuple):
        field = schema.field("tools").type if schema is not None and "tools" in schema.names else None
        cleaned["tools"] = _tool_schema(row["tools"], field)
    return cleaned


def plain_value(value: Any, where: str, column: str, depth: int = 0) -> Any:
    """Copy one value as `plain_row` does; `depth`: levels that it lies in."""
    kind = type(value)
    if depth > _MAX_DEPTH:
        named = f"column {column!r} is" if column else "a value is"
        raise DataError(f"{where}: {named} nested more than {_MAX_DEPTH} levels deep; drop or flatten it")
    if kind is str:
        if not value.isascii():
            _refuse_surrogates(value, where, column)
        return value
    if kind is float:
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str) and not key.isascii():
                _refuse_surrogates(key, where, column)
        return {key: plain_value(one, where, column, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(one, where, column, depth + 1) for one in value]
    if kind.__module__ == "numpy":
        return plain_value(value.tolist(), where, column) if hasattr(value, "tolist") else value
    return None if kind.__name__ in _NULLS_OF_PANDAS else value


def _refuse_surrogates(text: str, where: str, column: str) -> None:
    """Raise DataError for half a surrogate pair (from a JSON escape), which tokenizers and files cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {column!r} holds half a surrogate pair ({text[error.start]!r} at character "
            f"{error.start}), which is not valid text; cut text between characters, or drop the row"
        ) from None


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_without_nones(one) for one in value]
    return value


def _tool_schema(value: Any, field: Any, is_required: bool = False) -> Any:
    """Return a tool, or a part of its schema, without added nulls. `field`: its pyarrow type, if known."""
    if isinstance(value, list | tuple):
        return [_tool_schema(one, _item_type(field)) for one in value]
    if not isinstance(value, dict):
        return value
    nullable = not is_required and _allows_null(value)
    must_be_null = value.get("type", "null") in (None, "null") and _BESIDE_A_NULL.issuperset(_set_keys(value))
    required = value.get("required") if isinstance(value.get("required"), list | tuple) else ()
    kept: dict[str, Any] = {}
    for key, one in value.items():
        inner = _field_type(field, key)
        if one is None:
            if (key in _MAY_BE_NULL and (nullable or _is_null(inner))) or (key == "const" and must_be_null):
                kept[key] = None
        elif key == "properties" and isinstance(one, dict):
            kept[key] = {
                name: _tool_schema(part, _field_type(inner, name), name in (required or ()))
                for name, part in one.items()
                if part is not None
            }
        else:
            kept[key] = _tool_schema(one, inner)
    return kept


def _set_keys(schema: Row) -> set[str]:
    return {key for key, value in schema.items() if value is not None}


def _allows_null(schema: Row) -> bool:
    kinds = schema.get("type")
    options = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return (
        "null" in (kinds if isinstance(kinds, list | tuple) else [kinds])
        or schema.get("nullable") is True
        or None in (schema.get("enum") or ())
        or any(isinstance(option, dict) and option.get("type") == "null" for option in options)
    )


def _field_type(field: Any, name: str) -> Any:
    index = field.get_field_index(name) if hasattr(field, "get_field_index") else -1
    return field.field(index).type if index >= 0 else None


def _item_type(field: Any) -> Any:
    return getattr(field, "value_type", None)


def _is_null(field: Any) -> bool:
    return field is not None and str(field) == "null"
