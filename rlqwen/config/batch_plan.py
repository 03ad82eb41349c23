"""Compute how rows become updates, and how prompt and completion share the context."""

import math
from dataclasses import dataclass

from rlqwen.config import DPOConfig, OnlineConfig, PreferenceConfig, Recipe, SFTConfig, TrainerConfig
from rlqwen.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """Hold the batch arithmetic of a run."""

    rows_per_step: int
    """Rows of the data that one step takes."""
    updates_per_step: int
    """Optimizer updates per step; several if a rollout serves several."""
    total_updates: int
    """Optimizer updates of the whole run."""
    completions_per_update: int
    """Completions that one update trains on, on all ranks together; without sampling, rows."""
    text: str
    """The plan in one line."""


def plan_batch(config: TrainerConfig, num_rows: int | None, num_ranks: int = 1) -> BatchPlan:
    """Compute prompts x generations = completions = micro-batch x accumulation x ranks, and the resulting updates.

    `num_rows`: rows that are left after tokenization and packing; None for a stream. `num_ranks`: ranks that see different
    rows. Raises ConfigError if the batch does not divide evenly.
    """
    config = config.for_ranks(num_ranks)
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    split = f"{size} per micro-batch x {accumulation} accumulated x {_count(num_ranks, 'rank')}"
    if config.max_tokens_per_micro_batch is not None:
        split = f"micro-batches of up to {config.max_tokens_per_micro_batch:,} tokens x {_count(num_ranks, 'rank')}"
    if isinstance(config, OnlineConfig):
        completions, generations = config.completions_per_rollout(num_ranks), config.num_generations
        per_update = config.completions_per_update(num_ranks)
        rows = completions // generations
        shares = completions // per_update
        updates = shares * config.passes_per_rollout
        line = (
            f"{_count(rows, 'prompt')} x {_count(generations, 'generation')} = {completions} completions per rollout = "
        )
        line += f"{shares} x {per_update} = " if shares > 1 else ""
        line += f"{split}; {_count(updates, 'update')} per rollout"
        line += f" ({config.passes_per_rollout} passes)" if config.passes_per_rollout > 1 else ""
    else:
        rows = per_update = size * accumulation * num_ranks
        updates = 1
        line = f"{_count(rows, _row_name(config))} per update = {split}"
    total = config.max_steps
    if total < 0:
        total = math.ceil(_rows_in_all(config, num_rows or 0) / rows) * updates
    text = f"{line}; {_count(total, 'update')} in all"
    if num_rows is not None:
        text += f" = {total / updates * rows / max(num_rows, 1):.3g} epochs"
    return BatchPlan(rows, updates, total, per_update, text)


def check_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Raise ConfigError if this number of ranks cannot share the batch of a recipe."""
    parallel = recipe.train.parallel
    try:
        parallel.check_ranks(num_ranks)
        recipe.train.for_ranks(num_ranks // parallel.ranks_per_row)
    except ConfigError as error:
        raise ConfigError(f"{recipe.output_dir} ({recipe.algorithm}): {error}") from None


def refuse_stream(config: TrainerConfig) -> None:
    """Raise ConfigError for settings that do not work with a stream of training rows."""
    if not isinstance(config, SFTConfig | OnlineConfig):
        raise ConfigError(
            f"{type(config).__name__} cannot train on a stream, as sft, grpo and ppo can: leave streaming out, or take a "
            "number of rows first, as in list(stream.take(10_000))"
        )
    if config.max_steps < 0 and not (isinstance(config, OnlineConfig) and config.total_completions is not None):
        raise ConfigError(
            "max_steps: the training data is a stream, and how many rows it has is not known; set it, for example to 1000"
        )
    for key in ("eval_strategy", "save_strategy"):
        if getattr(config, key) == "epoch":
            raise ConfigError(f"{key}: 'epoch' is unknown of a stream before it ends; set it to 'steps'")


def prompt_room(context: int, config: OnlineConfig) -> int:
    """Return how many tokens a prompt may have: the context minus the completion, at most `max_prompt_length`.

    Raises ConfigError if the completion leaves nothing of the context, or if a prompt as long as allowed leaves the
    completion less than it may have.
    """
    completion, prompt = config.max_completion_length, config.max_prompt_length
    room = context - completion
    if room <= 0:
        raise ConfigError(
            f"max_completion_length={completion} leaves no room for a prompt: the model's context is {context} tokens"
        )
    if prompt is None:
        return room
    if prompt > room:
        raise ConfigError(
            f"max_prompt_length={prompt} leaves {max(context - prompt, 0)} tokens of the model's context of {context} "
            f"to the completion, but max_completion_length={completion}; lower one: max_prompt_length={room} fits"
        )
    return prompt


def _row_name(config: TrainerConfig) -> str:
    """Return what one row of the batch is called."""
    if isinstance(config, SFTConfig) and config.packing:
        return "packed row"
    if isinstance(config, PreferenceConfig):
        return "pair" if not isinstance(config, DPOConfig) or config.needs_pairs else "row"
    return "sequence"


def _rows_in_all(config: TrainerConfig, num_rows: int) -> float:
    """Return how many rows the run takes, those of later epochs counted again."""
    if isinstance(config, OnlineConfig) and config.total_completions is not None:
        return config.total_completions / config.num_generations
    return config.num_train_epochs * num_rows


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
