"""Images, videos and sounds in rows. rlqwen trains on text, so a row that has any is refused: it is never trained without
them, nor with a placeholder in their stead."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlqwen.errors import DataError

MEDIA_COLUMNS = ("image", "images", "video", "videos")
"""Columns, and keys of turns, by which data sets and TRL hand over media."""
_MEDIA_PARTS = ("image", "video", "audio")
"""Parts of a turn's content have types such as `image`, `image_url`, `input_image`, `input_audio`."""
_MEDIA_FILE = re.compile(
    r"(data:(image|video)/.*|https?://\S+|.+\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|mov|avi|mkv|webm)|[\w+/]{200,}={0,2})",
    re.IGNORECASE | re.DOTALL,
)
_DECODED = ("PIL", "torchcodec")
"""Packages whose objects `datasets` makes of images and videos."""
_EMPTY = ("", b"", "[]")
_STORED = {"bytes", "path"}
"""Keys of an image, a video or a sound in the tables of `datasets`."""


def refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError, which says how to mend it, where a column holds images or videos.

    Columns of any name are refused for images as objects, or as `datasets` stores them; those of MEDIA_COLUMNS for files
    and addresses too. Other text in `image` is the data's own, such as the image of a container.
    """
    for column, value in row.items():
        found = _first(value)
        if found is None or isinstance(value, int | float):
            continue
        is_text = isinstance(found, str)
        if column in MEDIA_COLUMNS and (not is_text or column.endswith("s") or _MEDIA_FILE.fullmatch(found)):
            raise DataError(f"{where}: column {column!r} holds {_shown(found)}, {media_advice(column)}")
        if not is_text and _is_stored(found):
            raise DataError(f"{where}: column {column!r} holds {_shown(found)}, {media_advice(column)}")


def refuse_message_media(turn: Mapping[str, Any], place: str) -> None:
    """Raise DataError where a turn has images or videos beside its text, or among the parts of its content."""
    for key in MEDIA_COLUMNS:
        if _first(turn.get(key)) is not None:
            raise DataError(f"{place} has {key!r}, {media_advice()}")
    content = turn.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        kinds = [kind] if kind is not None else [key for key, value in _items(part) if value is not None]
        named = next((one for one in kinds if any(medium in str(one) for medium in _MEDIA_PARTS)), None)
        if named is not None:
            raise DataError(f"{place} has a part of type {named!r}, {media_advice()}")


def _items(part: Any) -> Iterable[tuple[Any, Any]]:
    return part.items() if isinstance(part, dict) else ()


def _first(value: Any) -> Any:
    """Return the value, or the first one of a list of any depth; None where there is nothing."""
    while isinstance(value, list | tuple) or type(value).__module__ == "numpy":
        value = value.tolist() if hasattr(value, "tolist") else next((one for one in value if one is not None), None)
    if isinstance(value, str | bytes) and value.strip() in _EMPTY:
        return None
    if isinstance(value, dict) and all(one is None for one in value.values()):
        return None
    return value


def _is_stored(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == _STORED
    return type(value).__module__.partition(".")[0] in _DECODED


def _shown(value: Any) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"media (as {type(value).__name__})"


def media_advice(column: str | None = None) -> str:
    """Return what is missing for media, and how to mend it, as the end of a message."""
    drop = f", or, if the text stands by itself, the column ({column})" if column else ""
    return (
        "and rlqwen trains on text alone: it has no processor for images, videos or sounds, and keeps a vision tower as "
        f"it is; drop such rows{drop}, or train with TRL"
    )
