"""Load, mix and clean the rows of a recipe's `data` section."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen.config.data import DataConfig, SourceConfig
from rlqwen.data.cleaning import CleaningReport, clean_rows
from rlqwen.data.sources import load_rows, stream_rows
from rlqwen.data.streams import StreamedRows

Row = dict[str, Any]
_FIRST = 1000


@dataclass(slots=True)
class RecipeData:
    """Hold the training and evaluation rows of a run."""

    train: Sequence[Row] | StreamedRows
    eval: Sequence[Row] | None
    cleaning: CleaningReport | None = None
    """None if the recipe has no cleaning."""


def load_recipe_data(data: DataConfig) -> RecipeData:
    """Load training and eval rows, and clean them as the recipe says; raise an InputError for any problem."""
    evaluation = load_rows(data.eval, seed=data.mixing_seed, cache_dir=data.cache_dir) if data.eval else None
    if data.is_streamed:
        assert isinstance(data.train, SourceConfig)
        return RecipeData(stream_rows(data.train), evaluation)
    train = load_rows(data.train, seed=data.mixing_seed, cache_dir=data.cache_dir)
    return RecipeData(*clean_recipe_data(data, train, evaluation))


def first_rows(data: DataConfig) -> list[Row]:
    """Return the first training rows of a stream, to check their format."""
    assert isinstance(data.train, SourceConfig)
    return stream_rows(data.train).first(_FIRST)


def clean_recipe_data(
    data: DataConfig, train: Sequence[Row], evaluation: Sequence[Row] | None
) -> tuple[Sequence[Row], Sequence[Row] | None, CleaningReport | None]:
    """Clean rows that are already loaded as the recipe says."""
    if data.cleaning is None:
        return train, evaluation, None
    cleaned = clean_rows(train, data.cleaning, evaluation)
    return cleaned.train, cleaned.eval, cleaned.report
