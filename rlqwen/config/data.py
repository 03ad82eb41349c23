"""Configure the sources of rows, and how they are read."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from rlqwen.config.base import Config, PathText, Seed
from rlqwen.config.cleaning import CleaningConfig
from rlqwen.config.rollout import RewardSpecs, RolloutConfig, ScoringConfig


class SampledPairsConfig(Config):
    """Pairs of a model's own answers, a better and a worse one, that are sampled when the recipe is run."""

    prompts: "SourceConfig"
    """Source of the prompts; their other columns are passed to the rewards."""
    rewards: RewardSpecs = Field(min_length=1)
    """Rewards that decide which answer is better; several are added by weight."""
    model: PathText | None = None
    """The model whose answers are sampled. None: the model that the recipe starts from."""
    num_samples: int = Field(default=8, ge=2)
    """Answers per prompt."""
    pairs_per_prompt: int = Field(default=1, ge=1)
    """Most pairs per prompt; the best answer against the worst comes first."""
    min_gap: float = Field(default=0.0, ge=0)
    """The rewards of a pair differ by more than this."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for example `{enable_thinking: false}`."""
    seed: Seed = 42
    """Seed of sampling."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """The engines that sample answers."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    """The worker processes that call the rewards."""


class SourceConfig(Config):
    """One source of rows; several sources are mixed by weight."""

    path: PathText | None = None
    """A file (.json, .jsonl, .parquet, .csv), a folder of such files, a hub dataset id, or `builtin:NAME` (questions,
    instructions_zh, pairs): a few rows that come with rlqwen, with the columns of the hub dataset that they replace,
    and without its `name`, `split` and `revision`."""
    generator: str | None = None
    """A built-in generator, such as `arithmetic`, instead of `path`."""
    sampled: SampledPairsConfig | None = None
    """Preference pairs that a model will sample, instead of `path`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the generator."""
    name: str | None = None
    """Configuration of a hub dataset. None: its default."""
    split: str | None = None
    """Split of a hub dataset. None: `train`."""
    revision: str | None = None
    """Revision of a hub dataset, which pins it. None: the newest."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Map from our column names to those of the source, for example `{prompt: question, solution: answer}`."""
    system_prompt: str | None = None
    """System message to put before every prompt; it makes string prompts conversational. None: none is added."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in a mixture; 1 if only other sources have one. None for all sources: use all their rows."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many rows, from the first. None: all."""
    streaming: bool = False
    """Read and tokenize rows while training, in their own order, never all at once. Only for `data.train` of sft, grpo
    and ppo, and needs `train.max_steps`."""

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
    """Rows for evaluation, which are never trained on. None: no evaluation."""
    mixing_seed: Seed = 42
    """Seed of the order in which mixed sources are interleaved."""
    cache_dir: PathText | None = None
    """Folder for rows and token ids on disk. None: `data` in the folder that the environment variable RLQWEN_CACHE
    names, or else `rlqwen` in the cache of the datasets library (HF_DATASETS_CACHE)."""
    cleaning: CleaningConfig | None = None
    """Which training rows are dropped, and what is masked in all rows. None: nothing."""

    def sampled_sources(self) -> list[SampledPairsConfig]:
        """Return the sources that a model has to sample before training can begin."""
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
