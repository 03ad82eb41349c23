"""Configure which training rows are dropped, and what is masked in all rows, before tokenization."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlqwen.config.base import Config, PathText

MaskKind = Literal["key", "email", "id_card", "credit_card", "ip", "phone"]
Part = Literal["row", "prompt", "answer"]


class NearDuplicatesConfig(Config):
    """Configure when two rows count as near duplicates."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Smallest similarity of near duplicates: the share of runs of three words that both have, of all that either has
    (rlqwen.data.duplicates)."""


class PatternConfig(Config):
    """A regular expression, in the syntax of Python's `re`, that is searched for in each text of a row."""

    name: str = Field(min_length=1)
    """The name of its count in reports."""
    pattern: str
    """The expression. Begin it with `(?i)` to ignore case. One that matches the empty text would match every row, and
    is refused."""
    part: Part = "row"
    """Where to search. `row`: everywhere. `prompt`: all text before the last answer. `answer`: the last assistant
    message, the completion, or both answers of a pair."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            matches_all = re.compile(pattern).search("") is not None
        except re.error as error:
            raise ValueError(f"not a regular expression: {error} (value given: {pattern!r})") from None
        if matches_all:
            raise ValueError(f"matches the empty text, and so every row (value given: {pattern!r})")
        return pattern


def _switch(value: Any) -> Any:
    """Read `near_duplicates: true` as the default settings, and `false` as none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class CleaningConfig(Config):
    """Clean rows in this order: mask, length limits, patterns, exact duplicates, near duplicates, overlap with eval.

    Of equal rows the first stays. Evaluation rows are masked too, so that both sets look alike, but never dropped.
    """

    mask: list[MaskKind] = Field(default_factory=list)
    """What to replace by a placeholder such as `[EMAIL]`; rlqwen.data.cleaning.masking says what is found."""
    min_chars: int | None = Field(default=None, ge=1)
    """Fewest characters of a row, all messages together. None: no limit."""
    max_chars: int | None = Field(default=None, ge=1)
    """Most characters of a row, all messages together. None: no limit."""
    min_prompt_chars: int | None = Field(default=None, ge=1)
    """Fewest characters before the last answer. None: no limit."""
    max_prompt_chars: int | None = Field(default=None, ge=1)
    """Most characters before the last answer. None: no limit."""
    min_answer_chars: int | None = Field(default=None, ge=1)
    """Fewest characters of the last answer; of both answers of a pair. None: no limit."""
    max_answer_chars: int | None = Field(default=None, ge=1)
    """Most characters of the last answer; of both answers of a pair. None: no limit."""
    drop_patterns: list[PatternConfig] = Field(default_factory=list)
    """Drop rows in which at least one of these is found."""
    keep_patterns: list[PatternConfig] = Field(default_factory=list)
    """Drop rows in which at least one of these is not found."""
    exact_duplicates: bool = False
    """Drop rows that equal an earlier one in everything that is trained on."""
    near_duplicates: Annotated[NearDuplicatesConfig | None, BeforeValidator(_switch)] = None
    """Drop rows that nearly equal an earlier one; `true` for the default settings. None: keep them."""
    drop_eval_overlap: bool = False
    """Drop training rows whose prompt is also in the evaluation rows; near duplicates of such prompts too, if
    `near_duplicates` is set."""
    cache_dir: PathText | None = None
    """Folder for results. None: `$RLQWEN_CACHE/data`, otherwise `~/.cache/rlqwen/data`."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "CleaningConfig":
        for part in ("", "prompt_", "answer_"):
            low, high = getattr(self, f"min_{part}chars"), getattr(self, f"max_{part}chars")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{part}chars={low} is above max_{part}chars={high}, so no row would be left")
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "CleaningConfig":
        for key in ("drop_patterns", "keep_patterns"):
            names = [pattern.name for pattern in getattr(self, key)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{key}: two patterns are named {twice!r}; their counts would have the same name")
        return self
