"""Measure a model: sample k completions a prompt, score them, and report mean, pass@k and majority@k."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlqwen.check import check_model_path, prompt_room
from rlqwen.check.model import read_model
from rlqwen.check.recipe import check_reward_columns
from rlqwen.check.resources import uses_vllm
from rlqwen.config import GRPOConfig, ModelConfig, RewardSpec, RolloutConfig, ScoringConfig
from rlqwen.config.base import ArgumentsConfig
from rlqwen.config.data import Sources
from rlqwen.data import load_rows, tokenize_prompts
from rlqwen.errors import ConfigError
from rlqwen.loading import load_generation_config, load_model, local_folder, stop_token_ids
from rlqwen.metrics.figures import RewardFigures, reward_figures
from rlqwen.recipe import list_recipes, load_recipe
from rlqwen.rollout import RolloutEngine, build_engine
from rlqwen.scoring import Scorer, build_rewards
from rlqwen.tiny import resolve_model_path
from rlqwen.trainers.rollouts import sampling_seed
from rlqwen.types import Group, GroupRequest, Prompt, Sampling


class EvalConfig(ArgumentsConfig):
    """What to sample and how to score it."""

    model: str
    """Hub id, folder, or `builtin:tiny-qwen3`."""
    data: Sources
    rewards: list[RewardSpec] = Field(min_length=1)
    num_samples: int = Field(default=1, ge=1)
    """k: completions a prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """0: greedy."""
    max_tokens: int = Field(default=512, ge=1)
    """Of one completion."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many prompts."""
    seed: int = 42
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)


@dataclass(frozen=True)
class EvalResult:
    """Figures of one evaluation."""

    model: str
    num_prompts: int
    num_samples: int
    rewards: dict[str, RewardFigures]
    mean_length: float
    """Tokens a completion."""
    truncated: float
    """Share of completions cut off at the token limit."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluation_config(
    model: str,
    data: str,
    *,
    reward_names: str | None = None,
    columns: Sequence[str] = (),
    source: Mapping[str, Any] | None = None,
    **options: Any,
) -> EvalConfig:
    """The evaluation that the command line asks for; what it leaves open comes from the recipe, where `data` is one.

    Args:
        data: a file, folder or hub id, or a recipe by file or name: then its eval data (else its training data).
        reward_names: separated by commas.
        columns: `ours=theirs`.
        source: more fields of SourceConfig.
        options: fields of EvalConfig; None means not given.
    """
    mapping = dict(_split_column(column) for column in columns)
    source = {key: value for key, value in (source or {}).items() if value is not None}
    if mapping:
        source["columns"] = mapping
    if _is_recipe(data):
        if source:
            raise ConfigError(
                f"--data {data!r} is a recipe, which says itself how its data is read; leave {_list(source)}"
            )
        values = _from_recipe(data)
    else:
        values = {"data": {"path": data, **source}}
    if reward_names is not None:
        values["rewards"] = [{"name": name.strip()} for name in reward_names.split(",") if name.strip()]
    if not values.get("rewards"):
        raise ConfigError(
            "nothing to score by: give --rewards, such as --rewards accuracy (`rlqwen rewards` lists them)"
        )
    engine = options.pop("engine", None)
    if engine is not None:
        values["rollout"] = dict(values.get("rollout", {})) | {"engine": engine}
    values |= {key: value for key, value in options.items() if value is not None}
    return EvalConfig(model=model, **values)


def _is_recipe(data: str) -> bool:
    return Path(data).suffix in {".yaml", ".yml"} or data in {recipe.name for recipe in list_recipes()}


def _from_recipe(name: str) -> dict[str, Any]:
    recipe = load_recipe(name)
    source = recipe.data.train if recipe.data.eval is None else recipe.data.eval
    values: dict[str, Any] = {"data": source, "rewards": recipe.rewards}
    train = recipe.train
    if isinstance(train, GRPOConfig):
        values |= {
            "temperature": train.temperature,
            "max_tokens": train.max_completion_length,
            "chat_template_kwargs": train.chat_template_kwargs,
            "rollout": train.rollout.model_dump(exclude_unset=True),
            "scoring": train.scoring,
        }
    return values


def _split_column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise ConfigError(f"--column {text!r} is not of the form ours=theirs, such as prompt=question")
    return ours, theirs


def _list(source: Mapping[str, Any]) -> str:
    names = {"columns": "--column", "system_prompt": "--system-prompt", "split": "--split"}
    return " and ".join(names.get(key, key) for key in source) + " out"


def evaluate_model(config: EvalConfig) -> EvalResult:
    """Sample and score; progress goes to standard error. Raises InputError for a model, data or rewards that won't do.

    The same config gives the same completions.
    """
    started = time.monotonic()
    rewards = build_rewards([spec.name for spec in config.rewards], [spec.args for spec in config.rewards])
    rows = load_rows(config.data, seed=config.seed)[: config.limit]
    for reward in rewards:
        check_reward_columns(reward, rows, "data")
    with tempfile.TemporaryDirectory() as scratch, Scorer(rewards, config.scoring) as scorer:
        folder = _local_folder(config.model, Path(scratch))
        model = read_model(ModelConfig(path=folder), Path(scratch))
        assert model is not None  # a local folder is read or refused
        prompts, report = tokenize_prompts(
            rows,
            model.tokenizer,
            max_prompt_length=prompt_room(model.context, GRPOConfig(max_completion_length=config.max_tokens)),
            chat_template_kwargs=config.chat_template_kwargs,
        )
        engine = build_engine(
            config.rollout,
            model_path=folder,
            tokenizer=model.tokenizer,
            policy=None if uses_vllm(config.rollout) else _policy(folder),
            compute_dtype=model.dtype,
            max_model_length=max(len(prompt.token_ids) for prompt in prompts) + config.max_tokens,
            seed=config.seed,
        )
        try:
            stop_ids = stop_token_ids(model.tokenizer, load_generation_config(folder), report.end_of_turn)
            groups = _sample(engine, scorer, prompts, config, stop_ids)
        finally:
            engine.close()
    return summarise(config, groups, time.monotonic() - started)


def _sample(
    engine: RolloutEngine, scorer: Scorer, prompts: Sequence[Prompt], config: EvalConfig, stop_ids: tuple[int, ...]
) -> list[Group]:
    sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature, stop_token_ids=stop_ids)
    requests = [
        GroupRequest(
            prompt, tuple(sampling_seed(config.seed, "eval", place, k) for k in range(config.num_samples)), sampling
        )
        for place, prompt in enumerate(prompts)
    ]
    console = Console(stderr=True)
    arriving = engine.generate(requests)
    for group in track(arriving, "sampling", len(requests), console=console, disable=not console.is_terminal):
        scorer.submit(group)
    return scorer.wait()


def _local_folder(model: str, scratch: Path) -> str:
    """A folder with the model's files: itself, built, or downloaded to the hub's cache."""
    check_model_path(model)
    return local_folder(resolve_model_path(model, scratch))


def _policy(folder: str) -> Any:
    """The model in this process, which the transformers engine samples from."""
    from rlqwen.parallel import pick_device
    from rlqwen.policy import Policy

    args = GRPOConfig()
    return Policy(load_model(folder, args), args, peft_config=None, reference=False, device=pick_device(args.use_cpu))


def summarise(config: EvalConfig, groups: Sequence[Group], seconds: float) -> EvalResult:
    """Figures of scored groups."""
    completions = [completion for group in groups for completion in group.completions]
    return EvalResult(
        model=config.model,
        num_prompts=len(groups),
        num_samples=config.num_samples,
        rewards={name: reward_figures(groups, name) for name in groups[0].rewards},
        mean_length=sum(len(completion.token_ids) for completion in completions) / len(completions),
        truncated=sum(completion.is_truncated for completion in completions) / len(completions),
        seconds=round(seconds, 2),
    )


def show_evaluation(result: EvalResult, console: Console) -> None:
    """Print the figures as a table."""
    passes = sorted({k for figures in result.rewards.values() for k in figures.pass_at or {}})
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("reward")
    for heading in ("mean", *(f"pass@{k}" for k in passes), f"majority@{result.num_samples}", "missing"):
        table.add_column(heading, justify="right")
    for name, figures in result.rewards.items():
        cells = [figures.mean, *((figures.pass_at or {}).get(k) for k in passes), figures.majority]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in cells), str(figures.missing))
    console.print(
        f"{result.model}: {result.num_prompts} prompts x {result.num_samples} samples in {result.seconds:.0f} s, "
        f"{result.mean_length:.1f} tokens a completion, {result.truncated:.1%} cut off",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
