"""Filter rows by length bounds and patterns."""

import re
from collections.abc import Sequence
from typing import get_args

from rlqwen.config.cleaning import CleaningConfig, Part, PatternConfig
from rlqwen.data.cleaning.texts import Row, part_texts
from rlqwen.errors import ConfigError

_PREFIX: dict[Part, str] = {"row": "", "prompt": "prompt_", "answer": "answer_"}


class RowFilter:
    """Apply the filters of a config to single rows."""

    def __init__(self, config: CleaningConfig) -> None:
        self._bounds = [
            (part, key, getattr(config, key))
            for part in get_args(Part)
            for key in (f"min_{_PREFIX[part]}chars", f"max_{_PREFIX[part]}chars")
            if getattr(config, key) is not None
        ]
        self._drop = [_compile(pattern) for pattern in config.drop_patterns]
        self._keep = [_compile(pattern) for pattern in config.keep_patterns]

    def reason(self, row: Row) -> str | None:
        """Return the key of the first filter that the row fails, such as `max_chars` or `drop_patterns.refusal`, or None.

        Bounds of a part that a row lacks do not apply to it. If a row has two answers, both must be within the bounds.
        """
        for part, key, bound in self._bounds:
            lengths = [len(text) for text in part_texts(row, part)]
            if part != "answer" and lengths:
                lengths = [sum(lengths)]
            if any(length < bound if key.startswith("min") else length > bound for length in lengths):
                return key
        for name, part, pattern in self._drop:
            if any(pattern.search(text) for text in part_texts(row, part)):
                return f"drop_patterns.{name}"
        for name, part, pattern in self._keep:
            if not any(pattern.search(text) for text in part_texts(row, part)):
                return f"keep_patterns.{name}"
        return None

    def check_parts(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError for a filter of a part that no row has, because it would drop no row or every row."""
        named = [(key, part) for part, key, _ in self._bounds]
        named += [(f"drop_patterns ({name})", part) for name, part, _ in self._drop]
        named += [(f"keep_patterns ({name})", part) for name, part, _ in self._keep]
        for key, part in named:
            if not any(part_texts(row, part) for row in rows):
                columns = ", ".join(map(str, rows[0]))
                raise ConfigError(
                    f"data.cleaning.{key} looks at the {part}, but none of the {len(rows)} rows has one "
                    f"(columns of the first: {columns}); leave it out, or apply it to the whole row"
                )


def _compile(pattern: PatternConfig) -> tuple[str, Part, re.Pattern[str]]:
    return pattern.name, pattern.part, re.compile(pattern.pattern)
