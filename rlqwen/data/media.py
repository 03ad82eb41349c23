"""Refuse rows with images, videos or audio.

rlqwen trains on text. A row with media is neither trained without them nor with a placeholder.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlqwen.errors import DataError

MEDIA_COLUMNS = ("image", "images", "video", "videos")
"""Columns and message keys that hold media in data sets and in TRL."""
_MEDIA_PARTS = ("image", "video", "audio")
"""Words in the types of content parts, such as `image`, `image_url`, `input_image`, `input_audio`."""
_MEDIA_FILE = re.compile(
    r"(data:(image|video)/.*|https?://\S+|.+\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|mov|avi|mkv|webm)|[\w+/]{200,}={0,2})",
    re.IGNORECASE | re.DOTALL,
)
_DECODED = ("PIL", "torchcodec")
"""Packages to whose objects `datasets` decodes images and videos."""
_EMPTY = ("", b"", "[]")
_STORED = {"bytes", "path"}
"""Keys of an image, a video or an audio clip in the tables of `datasets`."""


def refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError, with advice, if a column holds images or videos.

    A column of any name is refused if it holds media as objects, or as `datasets` stores them. Columns of MEDIA_COLUMNS
    are also refused for file names and URLs. Other text in `image`, such as a container image, is allowed.
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


def refuse_message_media(message: Mapping[str, Any], where: str) -> None:
    """Raise DataError if a message has media in a key of its own, or among the parts of its content."""
    for key in MEDIA_COLUMNS:
        if _first(message.get(key)) is not None:
            raise DataError(f"{where} has {key!r}, {media_advice()}")
    content = message.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        kinds = [kind] if kind is not None else [key for key, value in _items(part) if value is not None]
        media_type = next((one for one in kinds if any(medium in str(one) for medium in _MEDIA_PARTS)), None)
        if media_type is not None:
            raise DataError(f"{where} has a part of type {media_type!r}, {media_advice()}")


def _items(part: Any) -> Iterable[tuple[Any, Any]]:
    return part.items() if isinstance(part, dict) else ()


def _first(value: Any) -> Any:
    """Return the value, or the first value of a nested list; None if it is empty."""
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
    """Return the end of a message that says why media are refused and what to do."""
    drop = f", or the column {column}, if the text is complete without it" if column else ""
    return (
        "and rlqwen trains on text alone: it has no processor for images, videos or audio, and does not train a vision "
        f"tower; drop such rows{drop}, or train with TRL"
    )
