"""Where rows come from and how they are read."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from rlqwen.config.base import Config
from rlqwen.config.cleaning import CleaningConfig
from rlqwen.config.rollout import RewardSpecs, RolloutConfig, ScoringConfig


class SampledPairsConfig(Config):
    """Pairs of a model's own answers, the better against the worse, drawn when the recipe is run."""

    prompts: "SourceConfig"
    """Where the prompts come from; their other columns go to the rewards."""
    rewards: RewardSpecs = Field(min_length=1)
    """What says which answer is better; several are added up by weight."""
    model: str | None = None
    """Whose answers. None: those of the model that the recipe starts from."""
    num_samples: int = Field(default=8, ge=2)
    """Answers to each prompt."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """At most; the best against the worst first."""
    min_gap: float = Field(default=0.0, ge=0)
    """Rewards of a pair differ by more than this."""
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, ge=1)
    """Of one answer."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    seed: int = 42
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)


class SourceConfig(Config):
    """One source of rows; several are mixed by weight."""

    path: str | None = None
    """A file (.json, .jsonl, .parquet, .csv), a folder of such files, a hub dataset id, or `builtin:NAME` (questions,
    instructions_zh, pairs): a few rows that come with rlqwen, with the columns of the hub dataset that they stand in
    for, whose `name`, `split` and `revision` they ignore."""
    generator: str | None = None
    """Instead of `path`: a built-in generator, such as `arithmetic`."""
    sampled: SampledPairsConfig | None = None
    """Instead of `path`: preference pairs that a model is to sample."""
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
    streaming: bool = False
    """Read and tokenise rows while training, in their own order, never all of them at once: for `data.train` of sft, grpo
    and ppo, with `train.max_steps`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceConfig":
        origins = [self.path, self.generator, self.sampled]
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError(
                "give one of 'path' (a file, folder or hub id), 'generator' (a built-in one) and 'sampled' (pairs of a "
                "model's own answers)"
            )
        if self.sampled is not None and self.sampled.prompts.sampled is not None:
            raise ValueError("sampled.prompts must be prompts that are there, not pairs to be sampled")
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
    cache_dir: str | None = None
    """Folder for rows and token ids on disk. None: `data` in the environment variable RLQWEN_CACHE, or else `rlqwen` in
    the cache of the datasets library (HF_DATASETS_CACHE)."""
    cleaning: CleaningConfig | None = None
    """What is dropped from the training rows and masked in all rows; None for nothing."""

    def sampled_sources(self) -> list[SampledPairsConfig]:
        """What a model is to sample before training can begin."""
        parts = [self.train, *([self.eval] if self.eval else [])]
        sources = [source for part in parts for source in (part if isinstance(part, list) else [part])]
        return [source.sampled for source in sources if source.sampled is not None]

    @property
    def is_streamed(self) -> bool:
        """Return whether the training rows are read as a stream, never all at once."""
        return isinstance(self.train, SourceConfig) and self.train.streaming

    @model_validator(mode="after")
    def _streams_stand_alone(self) -> "DataConfig":
        several = [one for part in (self.train, self.eval) if isinstance(part, list) for one in part]
        if any(source.streaming for source in several):
            raise ValueError(
                "streaming: sources that are mixed must be there as a whole; take streaming out, or mix none"
            )
        if isinstance(self.eval, SourceConfig) and self.eval.streaming:
            raise ValueError("eval.streaming: evaluation needs the same rows every time; set eval.limit instead")
        if self.is_streamed and self.cleaning:
            raise ValueError(
                "cleaning compares all rows, which a stream never has: take train.streaming or cleaning out"
            )
        return self

    @model_validator(mode="after")
    def _overlap_needs_eval(self) -> "DataConfig":
        if self.cleaning and self.cleaning.drop_eval_overlap and self.eval is None:
            raise ValueError("cleaning.drop_eval_overlap: there is no data.eval that training rows could overlap with")
        return self
