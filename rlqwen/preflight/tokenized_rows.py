"""Tokenize a recipe's rows as its trainer does, and report the resulting batches."""

import math
from collections.abc import Sequence
from typing import Any

from rlqwen.config import DPOConfig, OnlineConfig, PreferenceConfig, Recipe, RewardConfig, SFTConfig, TrainerConfig
from rlqwen.config.batch_plan import plan_batch, prompt_room
from rlqwen.data import (
    DataReport,
    tokenize_preference_examples,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_reward_rows,
    tokenize_sft,
)
from rlqwen.errors import DataError
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.model_check import ModelFacts

Row = dict[str, Any]

KNOWN_ROWS = (SFTConfig, PreferenceConfig, OnlineConfig)
"""Config classes whose rows a check can tokenize, as can any subclass of them."""


def unknown_rows(config: TrainerConfig) -> str | None:
    """Return why the rows of this config's trainer cannot be tokenized here; None if they can."""
    if isinstance(config, KNOWN_ROWS):
        return None
    names = ", ".join(known.__name__ for known in KNOWN_ROWS)
    return f"{type(config).__name__} is none of {names}, so that only its trainer knows how to read rows"


def tokenize(recipe: Recipe, rows: Sequence[Row], model: ModelFacts) -> DataReport:
    """Tokenize rows as the recipe's trainer does; raise DataError if they cannot be trained on."""
    config = recipe.train
    if isinstance(config, SFTConfig):
        _, data = tokenize_sft(rows, model.tokenizer, config)
        if not data.eos_in_loss:
            raise DataError(
                f"no sequence has its end-of-turn token {data.end_of_turn!r} in the loss, so the model would never learn "
                f"to stop; {data.num_truncated} of {data.num_rows} rows are cut at train.max_length={config.max_length}"
            )
        return data
    if isinstance(config, RewardConfig):
        return tokenize_reward_rows(rows, model.tokenizer, config)[1]
    if isinstance(config, DPOConfig):
        return tokenize_preference_examples(rows, model.tokenizer, config)[1]
    if isinstance(config, PreferenceConfig):
        return tokenize_preferences(rows, model.tokenizer, config)[1]
    assert isinstance(config, OnlineConfig)
    _, data = tokenize_prompts(
        rows,
        model.tokenizer,
        max_prompt_length=prompt_room(model.context, config),
        overlong=config.overlong_prompts,
        chat_template_kwargs=config.chat_template_kwargs,
        num_proc=config.dataset_num_proc,
    )
    return data


def describe_data(report: CheckReport, name: str, data: DataReport) -> None:
    """Add the counts, the form and the warnings of tokenized rows to the report."""
    report.facts.append((name, data.summary()))
    if name == "data.train":
        report.facts.append(("template", f"the model's turn ends with {data.end_of_turn!r}"))
    report.facts += [(f"{name} form", line) for line in data.form]
    report.warnings += [f"{name}: {note}" for note in data.notes]
    for warning in data.warnings:
        if warning not in report.warnings:
            report.warnings.append(warning)


def describe_thinking(report: CheckReport, config: OnlineConfig, model: ModelFacts) -> None:
    """Add to the report whether completions begin with a thought, if the template knows thoughts."""
    if "<think>" not in str(model.tokenizer.chat_template):
        return
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
    )
    end = str(prompt).rstrip()
    if end.endswith("<think>"):
        report.facts.append(("thinking", "on: the prompt opens the thought, which counts as part of the completion"))
    elif end.endswith("</think>"):
        report.facts.append(("thinking", "off: the prompt ends with an empty thought"))
    else:
        report.facts.append(("thinking", "left to the model: the prompt opens no thought"))


def describe_untokenized(
    report: CheckReport, recipe: Recipe, parts: dict[str, Sequence[Row] | None], data_size: int
) -> None:
    """Add the number of rows and the batch plan to the report, for rows that were not tokenized."""
    for name, rows in parts.items():
        if rows:
            report.facts.append((name, f"{len(rows)} rows"))
    packs = isinstance(recipe.train, SFTConfig) and recipe.train.packing
    if parts["data.train"] and not packs:
        num_rows = None if recipe.data.is_streamed else len(parts["data.train"])
        report.facts.append(("batch", plan_batch(recipe.train, num_rows, data_size).text))


def describe_batch(report: CheckReport, recipe: Recipe, data: DataReport, data_size: int) -> None:
    """Add the batch plan to the report; `data_size`: ranks that see different rows."""
    config = recipe.train
    if recipe.data.is_streamed:
        report.facts.append(("batch", plan_batch(config, None, data_size).text))
        return
    num_rows = data.num_kept
    if isinstance(config, SFTConfig) and config.packing and config.max_length:
        num_rows = math.ceil(data.num_tokens / config.max_length)
    plan = plan_batch(config, num_rows, data_size)
    report.facts.append(("batch", plan.text))
    if plan.rows_per_step > num_rows:
        report.warnings.append(
            f"one step takes {plan.rows_per_step} rows and there are {num_rows}: rows repeat within it"
        )
