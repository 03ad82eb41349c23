"""Configure an evaluation: from the command line, a recipe, or by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlqwen.config import (
    OnlineConfig,
    RewardSpec,
    RolloutConfig,
    SampledPairsConfig,
    ScoringConfig,
    SFTConfig,
    SourceConfig,
)
from rlqwen.config.base import ArgumentsConfig, PathText, Seed
from rlqwen.config.data import Sources
from rlqwen.config.evaluation import TextMetric
from rlqwen.config.recipe_yaml import is_recipe, load_recipe
from rlqwen.errors import ConfigError

AGAINST_DATA = "data"


class EvalConfig(ArgumentsConfig):
    """Say what to sample and how to score it."""

    model: PathText
    """Hub id, folder, or `builtin:tiny-qwen3`."""
    data: Sources
    rewards: list[RewardSpec] = Field(default_factory=list)
    metrics: list[Literal["perplexity", TextMetric]] = Field(default_factory=list)
    """`perplexity` measures given answers and samples nothing; the others compare completions with right answers."""
    against: PathText | None = None
    """Another model, or `data` for the rows' own answers: who gets the higher reward?"""
    reference: str | None = None
    """Column of the right answers, for metrics that compare; see EvalGenerationConfig."""
    labels: list[str] | None = Field(default=None, min_length=1)
    """For the metric `label`: the labels to choose from. None: all values of the reference column."""
    num_samples: int = Field(default=1, ge=1)
    """k: completions per prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """0: greedy."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of one completion."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to take, from the first; None: all."""
    seed: Seed = 42
    output: Path | None = None
    """Folder for `eval.json` and the completions."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    sft: SFTConfig = Field(default_factory=lambda: SFTConfig(max_length=None))
    """Which tokens of a row perplexity counts: those that SFT with this config would learn."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)

    @model_validator(mode="after")
    def _coherent(self) -> "EvalConfig":
        if not self.rewards and not self.metrics:
            raise ValueError(
                "nothing to measure: give --rewards, such as --rewards accuracy (`rlqwen rewards` lists them), or "
                "--metrics, such as --metrics perplexity,rouge"
            )
        if self.against is not None and not self.rewards:
            raise ValueError("--against asks which answer gets the higher reward: give --rewards")
        return self

    @property
    def text_metrics(self) -> list[TextMetric]:
        """Return the metrics that compare completions with right answers."""
        return [metric for metric in self.metrics if metric != "perplexity"]

    @property
    def samples(self) -> bool:
        """Return whether anything is sampled."""
        return bool(self.rewards or self.text_metrics)


def evaluation_config(
    model: str,
    data: str,
    *,
    reward_names: str | None = None,
    metric_names: str | None = None,
    columns: Sequence[str] = (),
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvalConfig:
    """Return the evaluation that the command line asks for; if `data` is a recipe, the rest comes from it.

    Args:
        data: a file, folder or hub id, or a recipe by file or name: then its eval data (else its training data).
        reward_names: separated by commas. None: the recipe's, unless metrics alone are asked for.
        metric_names: separated by commas.
        columns: `ours=theirs`.
        source: more fields of SourceConfig.
        options: fields of EvalConfig; None means not given.
    """
    mapping = dict(split_column(column) for column in columns)
    source = {key: value for key, value in (source or {}).items() if value is not None}
    if mapping:
        source["columns"] = mapping
    if is_recipe(data):
        if source:
            raise ConfigError(f"--data {data!r} is a recipe, which says how its data is read; leave {_list(source)}")
        values = _from_recipe(data)
    else:
        values = {"data": {"path": data, **source}}
    if metric_names is not None:
        values["metrics"] = split_names(metric_names)
        if options.get("against") is None:
            values.pop("rewards", None)
    if reward_names is not None:
        values["rewards"] = [{"name": name} for name in split_names(reward_names)]
    engine = options.pop("engine", None)
    if engine is not None:
        values["rollout"] = dict(values.get("rollout", {})) | {"engine": engine}
    values |= {key: value for key, value in options.items() if value is not None}
    return EvalConfig(model=model, **values)


def split_names(text: str) -> list[str]:
    """Return the names between commas, without white space; empty ones are dropped."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _from_recipe(name: str) -> dict[str, Any]:
    recipe = load_recipe(name)
    source = recipe.data.train if recipe.data.eval is None else recipe.data.eval
    if isinstance(source, SourceConfig) and source.sampled is not None:
        # A model is measured on the prompts that the pairs answer.
        return _from_sampled(source.sampled)
    values: dict[str, Any] = {"data": source, "rewards": recipe.rewards}
    train = recipe.train
    if isinstance(train, OnlineConfig):
        values |= {
            "temperature": train.temperature,
            "max_tokens": train.max_completion_length,
            "chat_template_kwargs": train.chat_template_kwargs,
            "rollout": train.rollout.model_dump(exclude_unset=True),
            "scoring": train.scoring,
        }
    elif isinstance(train, SFTConfig):
        values |= {"sft": train, "chat_template_kwargs": train.chat_template_kwargs}
    return values


def _from_sampled(sampled: SampledPairsConfig) -> dict[str, Any]:
    return {
        "data": sampled.prompts,
        "rewards": sampled.rewards,
        "temperature": sampled.temperature,
        "max_tokens": sampled.max_tokens,
        "chat_template_kwargs": sampled.chat_template_kwargs,
        "rollout": sampled.rollout.model_dump(exclude_unset=True),
        "scoring": sampled.scoring,
    }


def split_column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--column {text!r} is not of the form ours=theirs, such as prompt=question")
    return ours, theirs


def _list(source: Mapping[str, Any]) -> str:
    names = {"columns": "--column", "system_prompt": "--system-prompt", "split": "--split"}
    return " and ".join(names.get(key, key) for key in source) + " out"
