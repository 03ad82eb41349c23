"""Where rows come from and how they are read."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from rlqwen.config.base import Config
from rlqwen.config.cleaning import CleaningConfig


class SourceConfig(Config):
    """One source of rows; several are mixed by weight."""

    path: str | None = None
    """A file (.json, .jsonl, .parquet, .csv), a folder of such files, or a hub dataset id."""
    generator: str | None = None
    """Instead of `path`: a built-in generator, such as `arithmetic`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the generator."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset; `train` if not given."""
    revision: str | None = None
    """Revision of a hub dataset, to pin it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column map, ours: theirs; for example `{prompt: question, solution: answer}`."""
    system_prompt: str | None = None
    """Put before every prompt as a system turn; makes string prompts conversational."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source when several are mixed, 1 beside others that have one. None for all: all rows are used."""
    limit: int | None = Field(default=None, gt=0)
    """Take only the first so many rows."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        if (self.path is None) == (self.generator is None):
            raise ValueError("give either 'path' (a file, folder or hub id) or 'generator' (a built-in one)")
        return self


# Tags in angle brackets are left out of a fault's key path.
Sources = Annotated[
    Annotated[SourceConfig, Tag("<one>")] | Annotated[list[SourceConfig], Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list) else "<one>"),
]


class DataConfig(Config):
    """Training and evaluation rows."""

    train: Sources
    """One source, or several mixed by weight."""
    eval: Sources | None = None
    """Rows that evaluation uses; never trained on."""
    mixing_seed: int = 42
    """Seed of the order in which mixed sources are interleaved."""
    cleaning: CleaningConfig | None = None
    """What is dropped from the training rows and masked in all rows; None for nothing."""

    @model_validator(mode="after")
    def _overlap_needs_eval(self) -> "DataConfig":
        if self.cleaning and self.cleaning.drop_eval_overlap and self.eval is None:
            raise ValueError("cleaning.drop_eval_overlap: there is no data.eval that training rows could overlap with")
        return self
