"""Encode plain data as JSON that keeps its type, and decode it."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

_MAX_SMALL_INT = 1 << 62
_LISTS: tuple[Any, ...] = (
    list,
    collections.deque,
    range,
    Iterator,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def encode(value: Any, opaque: Callable[[Any], Any]) -> Any:
    """Encode plain data as JSON that keeps the type; `opaque` encodes or refuses everything else.

    An instance of a subclass of a plain type becomes that plain type, which drops methods that the code overrides.
    """
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, int):
        small = -_MAX_SMALL_INT < value < _MAX_SMALL_INT
        return int(value) if small else {"int": hex(value)}
    if isinstance(value, float | complex):
        return {"float": repr(float(value))} if isinstance(value, float) else {"complex": repr(complex(value))}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, opaque), encode(one, opaque)] for key, one in dict.items(value)]}
    for name, kinds in (("list", _LISTS), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kinds):
            return {name: [encode(one, opaque) for one in value]}
    if hasattr(value, "tolist") and not isinstance(value, type):
        return encode(value.tolist(), opaque)
    return opaque(value)


def decode(content: Any, handle: Callable[[int], Any]) -> Any:
    """Decode what `encode` returned. `handle` returns the object of a handle. Raises ValueError for other content."""
    if content is None or isinstance(content, bool | int | str):
        return content
    if not isinstance(content, dict) or len(content) != 1:
        raise ValueError(f"not an encoded value: {content!r:.80}")
    ((kind, inner),) = content.items()
    if kind in ("list", "tuple", "set"):
        values = [decode(one, handle) for one in inner]
        return values if kind == "list" else tuple(values) if kind == "tuple" else set(values)
    if kind == "dict":
        return {decode(key, handle): decode(value, handle) for key, value in inner}
    readers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": float,
        "complex": complex,
        "bytes": bytes.fromhex,
        "handle": handle,
    }
    if kind not in readers:
        raise ValueError(f"not an encoded value: {content!r:.80}")
    return readers[kind](inner)
