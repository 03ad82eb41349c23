"""Find out what to check: the rows of a path or a recipe, their kind, and the tokenizer and config to check them
with."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlqwen.config import (
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    OnlineConfig,
    PreferenceConfig,
    Recipe,
    SFTConfig,
    SourceConfig,
)
from rlqwen.config.cleaning import CleaningConfig
from rlqwen.config.recipe_yaml import is_recipe, load_recipe
from rlqwen.data.cleaning.cleaning_report import make_report
from rlqwen.data.cleaning.steps import find_outcome
from rlqwen.data.column_hints import suggest_mapping
from rlqwen.data.preference_formats import is_labelled, is_pair
from rlqwen.data.sources import Row, prepare_row, read_source
from rlqwen.errors import ConfigError, DataError, InputError, ModelError, PromptMismatch
from rlqwen.preflight.model_check import read_model
from rlqwen.preflight.reward_check import resolve_rewards
from rlqwen.preflight.tokenized_rows import unknown_rows
from rlqwen.rewards.registry import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sft", "prompts", "preference", "labelled", "unmapped"]
"""What rows are for; `unmapped`: their columns match no known form."""
TrainConfig = SFTConfig | PreferenceConfig | OnlineConfig

DEFAULT_MODEL = "builtin:tiny-qwen3"


@dataclass
class Part:
    """Training or evaluation rows, each with its place in its source, and the faults of rows that cannot be read."""

    name: str
    rows: list[Row] = field(default_factory=list)
    """Rows in our own form (rlqwen.data.formats)."""
    places: list[str] = field(default_factory=list)
    """Place of each row in its source, such as `train.jsonl, line 3`."""
    faults: list[str] = field(default_factory=list)
    """Messages about rows that cannot be read."""
    num_mismatches: int = 0
    """Faulty rows that are pairs whose prompts differ."""
    faulty_rows: set[int] = field(default_factory=set)
    """Indices in `rows` of rows that cannot be tokenized."""

    def short_places(self) -> list[str]:
        """Return `line 3` if all rows are of one file, else `train.jsonl, line 3`, with folders if names repeat."""
        split = [place.rpartition(", ") for place in self.places]
        files = {file for file, _, _ in split}
        if len(files) == 1:
            return [number for _, _, number in split]
        short = _short_names(files)
        return [f"{short[file]}, {number}" for file, _, number in split]


def _short_names(files: set[str]) -> dict[str, str]:
    """Return the name of each file; its path below the common folder if two files have the same name."""
    names = {file: Path(file).name for file in files}
    if len(set(names.values())) == len(files):
        return names
    return {file: os.path.relpath(file, os.path.commonpath([str(Path(one).parent) for one in files])) for file in files}


@dataclass
class CheckTarget:
    """The data to check, with its config and tokenizer."""

    title: str
    kind: Kind
    config: TrainConfig
    """Config of a trainer, for its lengths, masks and template."""
    model: str
    """Source of the tokenizer."""
    tokenizer: "PreTrainedTokenizerBase"
    context: int | None
    """Context of the trained model, in tokens. None if no model is trained, or if it cannot be read."""
    parts: dict[str, list[SourceConfig]]
    """Sources of `train` and, if there is one, `eval`."""
    warnings: list[str]
    cleaning: CleaningConfig | None = None
    is_recipe: bool = False
    rewards: list[Reward] | None = None
    """Rewards of a recipe that samples. None if there are none, or if they cannot be loaded yet."""

    @property
    def text_field(self) -> str:
        """Return the column of plain-text rows."""
        return self.config.dataset_text_field if isinstance(self.config, SFTConfig) else "text"


def find_target(
    target: str,
    *,
    model: str | None = None,
    evaluation: str | None = None,
    source: dict[str, object] | None = None,
    kind: Kind | None = None,
    max_length: int | None = None,
) -> CheckTarget:
    """Find out what to check; what the options leave open follows from the recipe, or from the rows.

    Args:
        target: a recipe by file or name, or a data file, folder or hub id.
        model: model whose tokenizer and template to use. None: the recipe's, otherwise `builtin:tiny-qwen3`.
        evaluation: evaluation data in addition to a path, for the overlap; a recipe has its own.
        source: more fields of SourceConfig, for a path.
        kind: what the rows are for. None: what the recipe trains, or what the rows look like.
        max_length: tokens beyond which rows of a path count as truncated; None: no limit.
    """
    if is_recipe(target):
        if source or evaluation or kind or max_length:
            raise ConfigError(
                f"{target!r} is a recipe, which says itself how its data is read: leave all but --model out"
            )
        return _of_recipe(target, model)
    paths = {"train": target} | ({"eval": evaluation} if evaluation else {})
    parts = {name: [SourceConfig.parse({"path": path, **(source or {})})] for name, path in paths.items()}
    kind = kind or guess_kind(parts["train"])
    configs: dict[Kind, TrainConfig] = {
        "sft": SFTConfig(max_length=max_length),
        "prompts": GRPOConfig(max_prompt_length=max_length),
    }
    config = configs.get(kind) or DPOConfig(max_length=max_length)
    warnings = (
        [] if model else [f"tokens are those of {DEFAULT_MODEL}, almost one a byte: give --model for a real count"]
    )
    path, tokenizer, _ = _read_tokenizer(ModelConfig(path=model or DEFAULT_MODEL), warnings)
    return CheckTarget(target, kind, config, path, tokenizer, None, parts, warnings)


def _of_recipe(name: str, model: str | None) -> CheckTarget:
    recipe = load_recipe(name)
    if reason := unknown_rows(recipe.train):
        raise ConfigError(f"{name}: {reason}")
    sources = {"train": recipe.data.train} | ({"eval": recipe.data.eval} if recipe.data.eval else {})
    parts = {name: source if isinstance(source, list) else [source] for name, source in sources.items()}
    config = recipe.train
    kind: Kind = "sft" if isinstance(config, SFTConfig) else "prompts"
    if isinstance(config, PreferenceConfig):
        kind = "labelled" if guess_kind(parts["train"]) == "labelled" else "preference"
    settings = recipe.model if model is None else ModelConfig(path=model)
    warnings: list[str] = []
    path, tokenizer, context = _read_tokenizer(settings, warnings)
    context = context if path == recipe.model.path else None
    assert isinstance(config, TrainConfig)
    title, cleaning = f"{name} ({recipe.algorithm})", recipe.data.cleaning
    return CheckTarget(
        title, kind, config, path, tokenizer, context, parts, warnings, cleaning, True, _find_rewards(recipe)
    )


def _find_rewards(recipe: Recipe) -> list[Reward] | None:
    try:
        return resolve_rewards(recipe.rewards) if recipe.rewards else None
    except InputError:  # `rlqwen check` reports it; or the reward is a model that is not trained yet
        return None


def _read_tokenizer(settings: ModelConfig, warnings: list[str]) -> tuple[str, "PreTrainedTokenizerBase", int | None]:
    """Return (model, tokenizer, context); if the model cannot be read, those of the built-in one, with a warning.

    A folder that holds a tokenizer and no model is enough; it has no context.
    """
    folder = Path(settings.path).expanduser()
    if not (folder / "config.json").exists() and (folder / "tokenizer.json").is_file():
        return settings.path, _load_tokenizer(folder, settings), None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            facts = read_model(settings, Path(scratch))
            problem = "is not on this machine and the hub cannot be reached"
        except ModelError as error:
            facts, problem = None, f"cannot be read ({error})"
        if facts is not None:
            return settings.path, facts.tokenizer, facts.context
        warnings.append(
            f"the model {settings.path!r} {problem}: tokens are those of {DEFAULT_MODEL}; give another with --model"
        )
        fallback = read_model(ModelConfig(path=DEFAULT_MODEL), Path(scratch))
    assert fallback is not None
    return DEFAULT_MODEL, fallback.tokenizer, fallback.context


def _load_tokenizer(folder: Path, settings: ModelConfig) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    return tokenizer


def guess_kind(sources: Sequence[SourceConfig]) -> Kind:
    """Return the kind of the first row that can be read; raise the last row's DataError if none can."""
    fault = DataError("there are no rows")
    for _, row in prepared_rows(sources):
        if not isinstance(row, DataError):
            return _kind_of(row)
        fault = row
    raise fault


def unmapped(row: Row) -> str:
    """Explain why the columns of a row match no known form, and how to fix it."""
    return (
        f"the columns {', '.join(map(str, row)) or '(none)'} are not mapped to any form of rows: {suggest_mapping(row)}"
    )


def _kind_of(row: Row) -> Kind:
    if is_pair(row):
        return "preference"
    if is_labelled(row):
        return "labelled"
    has_answer = "completion" in row or any(turn["role"] == "assistant" for turn in row.get("messages", []))
    if has_answer or isinstance(row.get("text"), str):
        return "sft"
    return "prompts" if "prompt" in row or "messages" in row else "unmapped"


def read_part(name: str, sources: Sequence[SourceConfig]) -> Part:
    """Read all rows of a part; a malformed row is noted and left out. Several sources follow each other, unmixed."""
    part = Part(name)
    for place, row in prepared_rows(sources):
        if isinstance(row, DataError):
            part.faults.append(str(row))
            part.num_mismatches += isinstance(row, PromptMismatch)
        else:
            part.rows.append(row)
            part.places.append(place)
    return part


def clean_parts(parts: list[Part], config: CleaningConfig) -> str:
    """Clean the rows as a run would, except for the order of mixed sources; return what was done, in one line."""
    train, *evaluation = parts
    given = evaluation[0].rows if evaluation else None
    outcome = find_outcome(train.rows, given, config)
    masked, stay = outcome.apply(train.rows, "train"), list(outcome.survivors(len(train.rows)))
    report = make_report(outcome, masked, given, folder=Path(), from_cache=False)
    train.rows, train.places = [masked[number] for number in stay], [train.places[number] for number in stay]
    for part in evaluation:
        part.rows = list(outcome.apply(part.rows, "eval"))
    return report.summary()


def prepared_rows(sources: Sequence[SourceConfig]) -> Iterator[tuple[str, Row | DataError]]:
    """Yield (place, the row in our own form or its fault); a file that breaks off ends its source there."""
    for source in sources:
        raw_rows = read_source(source)
        while True:
            try:
                where, raw = next(raw_rows)
            except StopIteration:
                break
            except DataError as error:
                yield "", error
                break
            try:
                yield where, prepare_row(raw, source, where)
            except DataError as error:
                yield where, error
