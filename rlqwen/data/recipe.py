"""The rows that a recipe's `data` section stands for: loaded, mixed and cleaned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlqwen.config.data import DataConfig
from rlqwen.data.cleaning import CleaningReport, clean_rows
from rlqwen.data.sources import load_rows

Row = dict[str, Any]


@dataclass(slots=True)
class RecipeData:
    """What a run trains and is evaluated on."""

    train: Sequence[Row]
    eval: Sequence[Row] | None
    cleaning: CleaningReport | None = None
    """None where the recipe asks for no cleaning."""


def load_recipe_data(data: DataConfig) -> RecipeData:
    """Load training and eval rows and clean them as the recipe says; everything wrong with them is an InputError."""
    train = load_rows(data.train, seed=data.mixing_seed, cache_dir=data.cache_dir)
    evaluation = load_rows(data.eval, seed=data.mixing_seed, cache_dir=data.cache_dir) if data.eval else None
    return clean_recipe_data(data, train, evaluation)


def clean_recipe_data(data: DataConfig, train: Sequence[Row], evaluation: Sequence[Row] | None) -> RecipeData:
    """The second half of `load_recipe_data`, for who has loaded the rows already."""
    if data.cleaning is None:
        return RecipeData(train, evaluation)
    cleaned = clean_rows(train, data.cleaning, evaluation)
    return RecipeData(cleaned.train, cleaned.eval, cleaned.report)
