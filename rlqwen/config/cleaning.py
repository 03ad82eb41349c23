"""What is taken out of the training rows, and what is masked in all rows, before anything is tokenised."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlqwen.config.base import Config

MaskKind = Literal["key", "email", "id_card", "credit_card", "ip", "phone"]
Part = Literal["row", "prompt", "answer"]


class NearDuplicatesConfig(Config):
    """When two rows count as nearly the same."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Similarity from which on they do: shared runs of three words, of all that either has (rlqwen.data.duplicates)."""


class PatternConfig(Config):
    """A regular expression, as Python's `re` reads it, that is searched for in each text of a row."""

    name: str = Field(min_length=1)
    """What the counts call it."""
    pattern: str
    """Write `(?i)` in front to ignore case. One that matches the empty text would match every row, and is refused."""
    part: Part = "row"
    """`prompt`: all before the last answer. `answer`: the last assistant turn, the completion, or both of a pair."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            matches_all = re.compile(pattern).search("") is not None
        except re.error as error:
            raise ValueError(f"not a regular expression: {error} (value given: {pattern!r})") from None
        if matches_all:
            raise ValueError(f"matches the empty text, hence every row (value given: {pattern!r})")
        return pattern


def _switch(value: Any) -> Any:
    """`near_duplicates: true` is the default settings, `false` is none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class CleaningConfig(Config):
    """Steps in their order: mask, bounds of length, patterns, exact duplicates, near duplicates, overlap with eval.

    Of equal rows the first stays. Eval rows are masked too, so that both look alike, and none of them is dropped.
    """

    mask: list[MaskKind] = Field(default_factory=list)
    """What is replaced by a placeholder such as `[EMAIL]`; see rlqwen.data.cleaning.masking for what is found."""
    min_chars: int | None = Field(default=None, ge=1)
    """Characters of the whole row, all turns together."""
    max_chars: int | None = Field(default=None, ge=1)
    min_prompt_chars: int | None = Field(default=None, ge=1)
    """Characters of all that comes before the last answer."""
    max_prompt_chars: int | None = Field(default=None, ge=1)
    min_answer_chars: int | None = Field(default=None, ge=1)
    """Characters of the last answer; of a pair, both answers must be long enough."""
    max_answer_chars: int | None = Field(default=None, ge=1)
    drop_patterns: list[PatternConfig] = Field(default_factory=list)
    """A row in which one of them is found is dropped."""
    keep_patterns: list[PatternConfig] = Field(default_factory=list)
    """A row in which one of them is not found is dropped."""
    exact_duplicates: bool = False
    """Drop rows that equal an earlier one in all that is trained on."""
    near_duplicates: Annotated[NearDuplicatesConfig | None, BeforeValidator(_switch)] = None
    """Drop rows that are nearly the same as an earlier one; `true` for the default settings."""
    drop_eval_overlap: bool = False
    """Drop training rows whose prompt an eval row has too; also nearly the same ones, if `near_duplicates` is set."""
    cache_dir: str | None = None
    """Where results are kept. None: `$RLQWEN_CACHE/data`, else `~/.cache/rlqwen/data`."""

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
                raise ValueError(f"{key}: two patterns are named {twice!r}; their counts could not be told apart")
        return self
