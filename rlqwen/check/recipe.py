"""All that can be found wrong with a recipe before it is run."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlqwen.check.arithmetic import plan_batch, prompt_room
from rlqwen.check.model import ModelFacts, check_model_path, read_model
from rlqwen.check.resources import check_resources
from rlqwen.config import DPOConfig, OnlineConfig, Recipe, RewardConfig, SFTConfig
from rlqwen.config.data import SourceConfig
from rlqwen.data import (
    DataReport,
    clean_recipe_data,
    load_rows,
    tokenize_comparisons,
    tokenize_prompts,
    tokenize_scored,
    tokenize_sft,
)
from rlqwen.data.formats import to_prompt_row
from rlqwen.errors import DataError, InputError
from rlqwen.metrics.run_folder import FINAL_FOLDER, refuse_used_folder
from rlqwen.quantization import require_bitsandbytes
from rlqwen.registry import Reward, check_columns
from rlqwen.scoring import build_rewards

Row = dict[str, Any]


@dataclass
class CheckReport:
    """What a check found."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(area, what was found), in the order of the checks."""
    warnings: list[str] = field(default_factory=list)
    faults: list[InputError] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A fault inside ends that check, not the others."""
        try:
            yield
        except InputError as fault:
            self.faults.append(fault)

    def show(self, console: Console) -> None:
        """Print facts, warnings and faults."""
        verdict = ("ok", "green") if not self.faults else (f"{len(self.faults)} wrong", "bold red")
        console.print(Text.assemble((self.title, "bold"), "  ", verdict))
        table = Table(box=None, show_header=False, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for area, found in self.facts:
            table.add_row(area, Text(found))
        for warning in self.warnings:
            table.add_row(Text("warning", style="yellow"), Text(warning))
        for fault in self.faults:
            table.add_row(Text("wrong", style="bold red"), Text(str(fault)))
        console.print(table)


def check_pipeline(recipes: Sequence[Recipe]) -> list[CheckReport]:
    """Check recipes that run one after the other: a later one may start from what an earlier one is yet to train."""
    reports = []
    for place, recipe in enumerate(recipes):
        report = check_recipe(recipe, starting_model(recipe, recipes[:place]))
        with report.collecting():
            _check_reference(recipe, recipes[:place])
        reports.append(report)
    return reports


def starting_model(recipe: Recipe, earlier: Sequence[Recipe]) -> Recipe:
    """The recipe whose model is there already: an earlier one that this one goes on from, or itself."""
    for place, before in enumerate(earlier):
        if Path(recipe.model.path) == Path(before.output_dir) / FINAL_FOLDER:
            return starting_model(before, earlier[:place])
    return recipe


def check_recipe(recipe: Recipe, start: Recipe | None = None) -> CheckReport:
    """Everything that can be found without a device. `start`: the recipe whose model this one goes on from."""
    report = CheckReport(f"{recipe.output_dir} ({recipe.algorithm})")
    start = start or recipe
    with report.collecting():
        refuse_used_folder(recipe.output_dir, overwrite=recipe.train.overwrite_output_dir)
    model = _check_model(report, recipe, start)
    train = _load(report, recipe, "train")
    evaluation = _load(report, recipe, "eval")
    train, evaluation = _clean(report, recipe, train, evaluation)
    if recipe.rewards:
        _check_rewards(report, recipe, {"data.train": train, "data.eval": evaluation})
    for name, rows in (("train", train), ("eval", evaluation)):
        if rows and model:
            with report.collecting():
                tokenized = _tokenize(recipe, rows, model)
                _describe_data(report, f"data.{name}", tokenized)
                if name == "train":
                    _describe_batch(report, recipe, tokenized)
    if not model:
        _describe_untokenized(report, recipe, {"data.train": train, "data.eval": evaluation})
    if isinstance(recipe.train, OnlineConfig):
        with report.collecting():
            report.facts.append(("rollout", check_resources(recipe.train.rollout)))
    return report


def check_before_run(recipes: Sequence[Recipe]) -> None:
    """What is quick to find and would be bitter to learn late: raises the first fault of a later stage, or of none.

    A trainer makes the other checks itself before it trains; a later stage's trainer is built only when the earlier
    stages are done.
    """
    for place, recipe in enumerate(recipes):
        refuse_used_folder(recipe.output_dir, overwrite=recipe.train.overwrite_output_dir)
        if starting_model(recipe, recipes[:place]) is recipe:
            check_model_path(recipe.model.path)
        _check_reference(recipe, recipes[:place])
        if isinstance(recipe.train, OnlineConfig):
            check_resources(recipe.train.rollout)
        if place and recipe.rewards:
            rewards = resolve_rewards(recipe)
            rows = load_rows(recipe.data.train, seed=recipe.data.mixing_seed)
            for reward in rewards:
                check_reward_columns(reward, rows, "data.train")


def resolve_rewards(recipe: Recipe) -> list[Reward]:
    """The recipe's rewards, imported."""
    return build_rewards([spec.name for spec in recipe.rewards], [spec.args for spec in recipe.rewards])


def check_reward_columns(reward: Reward, rows: Sequence[Row], where: str) -> None:
    """Raise RewardSpecError unless every row has the columns that the reward cannot do without."""
    seen: set[frozenset[str]] = set()
    for number, row in enumerate(rows):
        columns = frozenset(row)
        if columns not in seen:
            seen.add(columns)
            prompt_row = to_prompt_row(row, f"{where}, row {number}")
            check_columns(
                reward, sorted(set(prompt_row) - {"prompt"}), where if number == 0 else f"{where}, row {number}"
            )


def _check_model(report: CheckReport, recipe: Recipe, start: Recipe) -> ModelFacts | None:
    if recipe.model.quantization is not None:
        with report.collecting():
            require_bitsandbytes("model.quantization")
    with report.collecting(), tempfile.TemporaryDirectory() as scratch:
        model = read_model(start.model, Path(scratch))
        if model is None:
            report.warnings.append(
                f"model {start.model.path!r} is not on this machine and the hub cannot be reached: "
                "template, loss masks, lengths and context were not checked"
            )
            return None
        yet_to_train = "" if start is recipe else f", to be trained from {start.model.path}"
        size = f", {model.num_bytes / 1e6:,.1f} MB of weights" if model.num_bytes else ""
        report.facts.append(("model", f"{recipe.model.path}{yet_to_train}, context {model.context:,}{size}"))
        return model
    return None


def _check_reference(recipe: Recipe, earlier: Sequence[Recipe]) -> None:
    """Raise ModelError for a reference that is neither there nor what an earlier recipe is yet to train."""
    path = recipe.train.ref_model if isinstance(recipe.train, DPOConfig) else None
    if path is not None and Path(path) not in [Path(before.output_dir) / FINAL_FOLDER for before in earlier]:
        check_model_path(path, "train.ref_model")


def _load(report: CheckReport, recipe: Recipe, part: str) -> list[Row] | None:
    source: SourceConfig | list[SourceConfig] | None = getattr(recipe.data, part)
    if source is None:
        if part == "eval" and recipe.train.eval_strategy != "no":
            with report.collecting():
                raise DataError(f"train.eval_strategy is {recipe.train.eval_strategy!r}, but there is no data.eval")
        return None
    with report.collecting():
        return load_rows(source, seed=recipe.data.mixing_seed)
    return None


def _clean(
    report: CheckReport, recipe: Recipe, train: list[Row] | None, evaluation: list[Row] | None
) -> tuple[list[Row] | None, list[Row] | None]:
    """The rows that a run would see; none where they can't be had."""
    if recipe.data.cleaning is None or train is None or (recipe.data.eval is not None and evaluation is None):
        return train, evaluation
    with report.collecting():
        data = clean_recipe_data(recipe.data, train, evaluation)
        assert data.cleaning is not None
        listed = f"; listed in {data.cleaning.folder}" if data.cleaning.dropped and data.cleaning.folder else ""
        report.facts.append(("cleaning", data.cleaning.summary() + listed))
        report.warnings += data.cleaning.warnings
        return data.train, data.eval
    return None, None


def _check_rewards(report: CheckReport, recipe: Recipe, parts: dict[str, list[Row] | None]) -> None:
    with report.collecting():
        rewards = resolve_rewards(recipe)
        named = zip(rewards, recipe.rewards, strict=True)
        text = ", ".join(f"{reward.name} x {spec.weight:g} ({reward.origin})" for reward, spec in named)
        report.facts.append(("rewards", text))
        for reward in rewards:
            for where, rows in parts.items():
                with report.collecting():
                    check_reward_columns(reward, rows or [], where)


def _tokenize(recipe: Recipe, rows: list[Row], model: ModelFacts) -> DataReport:
    config = recipe.train
    if isinstance(config, SFTConfig):
        _, data = tokenize_sft(rows, model.tokenizer, config)
        if not data.eos_in_loss:
            raise DataError(
                f"no sequence has its end-of-turn token {data.end_of_turn!r} in the loss, so the model would never learn "
                f"to stop; {data.num_truncated} of {data.num_rows} rows are cut at train.max_length={config.max_length}"
            )
        return data
    if isinstance(config, DPOConfig):
        return tokenize_comparisons(rows, model.tokenizer, config)[1]
    if isinstance(config, RewardConfig):
        return tokenize_scored(rows, model.tokenizer, config)[1]
    assert isinstance(config, OnlineConfig)
    _, data = tokenize_prompts(
        rows,
        model.tokenizer,
        max_prompt_length=prompt_room(model.context, config),
        overlong=config.overlong_prompts,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    return data


def _describe_data(report: CheckReport, name: str, data: DataReport) -> None:
    report.facts.append((name, data.summary()))
    if name == "data.train":
        report.facts.append(("template", f"the model's turn ends with {data.end_of_turn!r}"))
    for warning in data.warnings:
        if warning not in report.warnings:
            report.warnings.append(warning)


def _describe_untokenized(report: CheckReport, recipe: Recipe, parts: dict[str, list[Row] | None]) -> None:
    for name, rows in parts.items():
        if rows:
            report.facts.append((name, f"{len(rows)} rows"))
    packs = isinstance(recipe.train, SFTConfig) and recipe.train.packing
    if parts["data.train"] and not packs:
        report.facts.append(("batch", plan_batch(recipe.train, len(parts["data.train"])).text))


def _describe_batch(report: CheckReport, recipe: Recipe, data: DataReport) -> None:
    num_rows, config = data.num_kept, recipe.train
    if isinstance(config, SFTConfig) and config.packing and config.max_length:
        num_rows = math.ceil(data.num_tokens / config.max_length)
    plan = plan_batch(config, num_rows)
    report.facts.append(("batch", plan.text))
    if plan.rows_per_step > num_rows:
        report.warnings.append(
            f"one step takes {plan.rows_per_step} rows and there are {num_rows}: rows repeat within it"
        )
