"""Find everything that is wrong with one recipe before it is run."""

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import OnlineConfig, Recipe, SampledPairsConfig
from rlqwen.config.batch_plan import refuse_stream
from rlqwen.config.data import SourceConfig
from rlqwen.data import DataReport, clean_recipe_data, first_rows, load_rows
from rlqwen.distributed.adamw import require_8bit
from rlqwen.errors import DataError
from rlqwen.models.model_classes import check_weights
from rlqwen.models.quantization import require_bitsandbytes
from rlqwen.preflight.check_report import CheckReport
from rlqwen.preflight.memory_estimate import describe_memory, describe_parameters, own_gpu_bytes
from rlqwen.preflight.model_check import NO_TOKENIZER, ModelFacts, read_config, read_tokenizer, what_is_missing
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.resource_check import check_resources
from rlqwen.preflight.reward_check import check_rewards
from rlqwen.preflight.run_check import check_best_metric, run_checks
from rlqwen.preflight.tokenized_rows import (
    describe_batch,
    describe_data,
    describe_thinking,
    describe_untokenized,
    tokenize,
    unknown_rows,
)
from rlqwen.rewards.registry import Reward

Row = dict[str, Any]


def check_recipe(
    recipe: Recipe,
    start: Recipe | None = None,
    to_train: Collection[str] = (),
    *,
    gpu_gib: float | None = None,
    num_ranks: int = 1,
) -> CheckReport:
    """Check everything that needs no device.

    `start`: the recipe whose model this one continues from. `to_train`: folders of models that earlier recipes will
    train. `gpu_gib`: memory of each GPU to plan for; None: those of this machine, if it has any. `num_ranks`: ranks to plan for.
    """
    report = CheckReport(f"{recipe.output_dir} ({recipe.algorithm})")
    start = start or recipe
    data_size = max(1, num_ranks // recipe.train.parallel.ranks_per_row)
    with report.collecting():
        recipe.train.parallel.check_ranks(max(num_ranks, recipe.train.parallel.ranks_per_row))
        recipe.train.for_ranks(data_size)  # whether or not there are rows to plan batches of
    if note := recipe.train.parallel.unused_note():
        report.warnings.append(note)
    with report.collecting():
        require_8bit(recipe.train)
    report.collect(run_checks(recipe))
    model, size = _check_model(report, recipe, start)
    longest: int | None = None
    train = _load(report, recipe, "train")
    evaluation = _load(report, recipe, "eval")
    train, evaluation = _clean(report, recipe, train, evaluation)
    taken: set[str] | None = None
    rewards: list[Reward] | None = []
    if isinstance(recipe.train, OnlineConfig) and recipe.rewards:
        parts = {"data.train": train, "data.eval": evaluation}
        taken, rewards = check_rewards(report, recipe.rewards, parts, to_train=to_train, scoring=recipe.train.scoring)
    with report.collecting():
        note = check_best_metric(recipe, rewards)
        report.warnings += [note] if note else []
    unknown = unknown_rows(recipe.train)
    for name, rows in (("train", train), ("eval", evaluation)):
        if rows and unknown:
            report.warnings.append(f"data.{name} was not tokenized: {unknown}")
        elif rows and model:
            with report.collecting():
                tokenized = _tokenize(recipe, rows, model, f"data.{name}")
                if isinstance(recipe.train, OnlineConfig):
                    tokenized.name_unused(taken)
                describe_data(report, f"data.{name}", tokenized)
                longest = tokenized.lengths.get("max") if name == "train" else longest
                if name == "train":
                    if isinstance(recipe.train, OnlineConfig):
                        describe_thinking(report, recipe.train, model)
                    describe_batch(report, recipe, tokenized, data_size)
    if unknown or not model:
        with report.collecting():
            describe_untokenized(report, recipe, {"data.train": train, "data.eval": evaluation}, data_size)
    if size is not None:
        with report.collecting():
            describe_memory(report, recipe, size, longest=longest, gpu_gib=gpu_gib, num_ranks=num_ranks)
    if isinstance(recipe.train, OnlineConfig):
        if recipe.train.correction_note:
            report.warnings.append(recipe.train.correction_note)
        with report.collecting():
            report.facts.append(("rollout", check_resources(recipe.train.rollout)))
    return report


def check_memory(recipe: Recipe, start: Recipe, *, num_ranks: int) -> None:
    """Raise ResourceError if this machine's GPUs do not hold the recipe's memory plan, as `check_recipe` finds it.

    `start`, `num_ranks`: see `check_recipe`. Rows are tokenized, to find the longest, only if the longest that the config allows does
    not fit. Other faults are left to the run.
    """
    if recipe.train.use_cpu or own_gpu_bytes() is None:
        return
    report = CheckReport("")
    model, size = _check_model(report, recipe, start)
    if size is None:
        return
    fitting = CheckReport("")
    describe_memory(fitting, recipe, size, num_ranks=num_ranks)
    if fitting.faults and model and not unknown_rows(recipe.train):
        rows, _ = _clean(report, recipe, _load(report, recipe, "train"), _load(report, recipe, "eval"))
        with report.collecting():
            longest = _tokenize(recipe, rows, model, "data.train").lengths.get("max") if rows else None
            fitting = CheckReport("")
            describe_memory(fitting, recipe, size, longest=longest, num_ranks=num_ranks)
    for fault in fitting.faults:
        raise fault


def _tokenize(recipe: Recipe, rows: Sequence[Row], model: ModelFacts, name: str) -> DataReport:
    """Call `tokenize`; name in each fault the part of the data that holds its row."""
    try:
        return tokenize(recipe, rows, model)
    except DataError as fault:
        raise type(fault)(f"{name}, {fault}" if str(fault).startswith("row ") else str(fault)) from None


def _check_model(report: CheckReport, recipe: Recipe, start: Recipe) -> tuple[ModelFacts | None, ModelSize | None]:
    """Return the facts about the starting model, and what its memory depends on; None for what cannot be read."""
    if recipe.model.quantization is not None:
        with report.collecting():
            require_bitsandbytes("model.quantization")
    with report.collecting(), tempfile.TemporaryDirectory() as scratch:
        missing = what_is_missing(start.model.path)
        found = read_config(start.model, Path(scratch))
        if found is None:
            report.warnings.append(
                f"model {start.model.path!r} is not on this machine and the hub cannot be reached: "
                "parameters, template, loss masks, lengths and context were not checked"
            )
            return None, None
        yet_to_train = "" if start is recipe else f", to be trained from {start.model.path}"
        stored = f", {found.num_bytes / 1e6:,.1f} MB of weights" if found.num_bytes else ""
        line = f"{recipe.model.path}{yet_to_train}, context {found.context:,}, {found.dtype}{stored}"
        report.facts.append(("model", line))
        if missing:
            report.warnings.append(
                f"{start.model.path} lacks {' and '.join(missing)}: checked without; a run would refuse it"
            )
        size = describe_parameters(report, recipe, found)
        if not missing:
            with report.collecting():
                check_weights(found.path, revision=start.model.revision, **_loading(recipe))
        if NO_TOKENIZER in missing:
            return None, size
        model = read_tokenizer(found)
        if model is None:
            report.warnings.append(
                f"the tokenizer of {start.model.path!r} is not on this machine: template, loss masks and lengths were not "
                "checked"
            )
        return model, size
    return None, None


def _loading(recipe: Recipe) -> dict[str, bool]:
    return {"scalar": recipe.train.trains_scalar_model, "trust_remote_code": recipe.model.trust_remote_code}


def _load(report: CheckReport, recipe: Recipe, part: str) -> Sequence[Row] | None:
    source: SourceConfig | list[SourceConfig] | None = getattr(recipe.data, part)
    if source is None:
        if part == "eval" and recipe.train.eval_strategy != "no":
            with report.collecting():
                raise DataError(f"train.eval_strategy is {recipe.train.eval_strategy!r}, but there is no data.eval")
        return None
    sampled = [one.sampled for one in (source if isinstance(source, list) else [source]) if one.sampled]
    for pairs in sampled:
        _check_sampled(report, recipe, f"data.{part}", pairs)
    if sampled:
        return None
    with report.collecting():
        if part == "train" and recipe.data.is_streamed:
            refuse_stream(recipe.train)
            rows = first_rows(recipe.data)
            report.facts.append(("data.train", f"a stream, of which the first {len(rows)} rows are checked"))
            return rows
        return load_rows(source, seed=recipe.data.mixing_seed, cache_dir=recipe.data.cache_dir)
    return None


def _check_sampled(report: CheckReport, recipe: Recipe, name: str, pairs: SampledPairsConfig) -> None:
    """Check the prompts and rewards of pairs that the run will sample."""
    with report.collecting():
        prompts = load_rows(pairs.prompts, seed=pairs.seed)
        drawn = f"{len(prompts)} prompts x {pairs.num_samples} answers of {pairs.model or recipe.model.path}"
        report.facts.append((name, f"pairs to be sampled: {drawn}; {check_resources(pairs.rollout)}"))
        check_rewards(report, pairs.rewards, {f"{name}.sampled.prompts": prompts}, to_train=(), scoring=pairs.scoring)


def _clean(
    report: CheckReport, recipe: Recipe, train: Sequence[Row] | None, evaluation: Sequence[Row] | None
) -> tuple[Sequence[Row] | None, Sequence[Row] | None]:
    """Return the rows that a run would see; None if they cannot be read."""
    if recipe.data.cleaning is None or train is None or (recipe.data.eval is not None and evaluation is None):
        return train, evaluation
    with report.collecting():
        train, evaluation, cleaning = clean_recipe_data(recipe.data, train, evaluation)
        assert cleaning is not None
        listed = f"; listed in {cleaning.folder}" if cleaning.dropped and cleaning.folder else ""
        report.facts.append(("cleaning", cleaning.summary() + listed))
        report.warnings += cleaning.warnings
        return train, evaluation
    return None, None
