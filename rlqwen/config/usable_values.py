"""Refuse values that no key of a config can have: not finite, out of range, not text, or nested too deeply."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlqwen.errors import ConfigError, quoted

MAX_DEPTH = 50
"""Most levels of lists and mappings in a recipe."""
LARGEST = 2**63 - 1
"""Largest whole number."""
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes of a file's name and of a path, as Linux allows them."""


def refuse_unusable(values: Any) -> None:
    """Raise ConfigError, which names the key, for a value in nested lists and mappings that cannot be meant.

    Values of other types than JSON's are not looked into.
    """
    _walk(values, (), 0)


def real_path(path: str | Path) -> Path:
    """Return an absolute path with links followed; of links that form a loop, those up to it.

    `Path.resolve` raises RuntimeError for a loop.
    """
    return Path(os.path.realpath(path))


def expand_path(text: str) -> str:
    """Return a path with `~` and `$NAME` expanded; raise ValueError for one that no file can have."""
    expanded = os.path.expanduser(text) if text.startswith("~") else text  # noqa: PTH111 - Path() would drop `./` and `//`
    if expanded.startswith("~") and "/" in text:
        raise ValueError(f"there is no user of that name here (value given: {quoted(text)})")
    for name in _VARIABLE.findall(expanded):
        if (name := name.strip("${}")) not in os.environ:
            raise ValueError(f"the environment variable {name!r} is not set (value given: {quoted(text)})")
    expanded = _VARIABLE.sub(lambda found: os.environ[found[0].strip("${}")], expanded)
    if not expanded.strip():
        raise ValueError("must not be empty")
    try:
        parts = [os.fsencode(part) for part in expanded.split("/")]
    except UnicodeEncodeError:
        raise ValueError(f"is not valid Unicode (value given: {quoted(text)})") from None
    if max(map(len, parts)) > _LONGEST_NAME or sum(map(len, parts)) + len(parts) > _LONGEST_PATH:
        raise ValueError(
            f"too long for a path: {len(expanded):,} characters, where a name has at most {_LONGEST_NAME} bytes "
            f"(value given: {quoted(text)})"
        )
    return expanded


def text_fault(text: str) -> str | None:
    """Return what makes a text useless as a value, a key or a path; None if nothing does."""
    if "\0" in text:
        return "must not hold the character NUL"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid Unicode, for it holds half of a surrogate pair, or bytes that are not UTF-8"
    return None


def number_fault(number: float) -> str | None:
    """Return what makes a number useless as a value; None if nothing does."""
    if isinstance(number, int):
        return "must fit into 64 bits" if abs(number) > LARGEST else None
    return None if math.isfinite(number) else "must be a finite number"


def key_path(path: tuple[object, ...]) -> str:
    """Return the dotted path of a key, each part cut to what a message may show."""
    return ".".join(str(part)[:80] for part in path)


def _walk(value: Any, path: tuple[object, ...], depth: int) -> None:
    fault = None
    if isinstance(value, str):
        fault = text_fault(value)
    elif isinstance(value, int | float):
        fault = number_fault(value)
    elif depth > MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        raise ConfigError(f"{key_path(path[:3])}: nested more than {MAX_DEPTH} levels deep, or holds itself")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and (fault := text_fault(key)):
                raise ConfigError(f"{key_path(path) or 'a key'}: the name {quoted(key)} {fault}")
            _walk(inner, (*path, key), depth + 1)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _walk(inner, (*path, place), depth + 1)
    if fault:
        raise ConfigError(f"{key_path(path)}: {fault} (value given: {quoted(value)})")
