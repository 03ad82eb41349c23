"""Check what a recipe says about the run itself: schedule, sinks, metric to compare by, checkpoint and folders.

Nothing of it needs a model, data or a device, and a run would meet some of it only after hours.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import torch

from rlqwen.checkpoint.resumable import check_resumable
from rlqwen.config import DistillationConfig, DPOConfig, OnlineConfig, Recipe, RewardConfig, SFTConfig
from rlqwen.config.dpo import LossName
from rlqwen.distributed.lr_schedule import build_schedulers
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import TRAINERS
from rlqwen.reporting.metric_names import find_metric
from rlqwen.reporting.sinks import check_sinks
from rlqwen.rewards.registry import Reward
from rlqwen.rewards.result_recorder import CALL_STATUSES
from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER

T = TypeVar("T")
_UPDATES = 1000
"""Updates of the schedule that is tried out, if `max_steps` does not say how many a run has."""
_OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_OF_GROUPS = (
    "reward/mean", "reward/std", "reward/missing", "completions/mean_length", "completions/max_length",
    "completions/truncated", "scoring/restarts",
)  # fmt: skip
_OF_A_REWARD = ("mean", "seconds", "wait_seconds", *CALL_STATUSES)


def run_checks(recipe: Recipe) -> list[Callable[[], object]]:
    """Return the checks of a recipe that need nothing but the recipe; each raises ConfigError."""
    return [
        lambda: check_schedule(recipe),
        lambda: _as_train(lambda: check_sinks(recipe.train.report_to)),
        lambda: _as_train(lambda: check_resumable(recipe.train.resume_from_checkpoint, Path(recipe.output_dir))),
        lambda: check_folders(recipe),
    ]


def check_schedule(recipe: Recipe) -> None:
    """Raise ConfigError if the schedule does not exist, refuses its arguments, or computes a rate that is not finite."""
    train = recipe.train
    total = train.max_steps if train.max_steps > 0 else _UPDATES
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
    (schedule,) = _as_train(lambda: build_schedulers(train, [optimizer], total))
    for update in sorted({0, 1, total // 2, total - 1, total}):
        try:
            ratio = float(schedule.lr_lambdas[0](update))
        except (ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"train.lr_scheduler_type={train.lr_scheduler_type!r}: update {update}: {error}"
            ) from None
        if not torch.tensor(ratio).isfinite():
            raise ConfigError(
                f"train.lr_scheduler_type={train.lr_scheduler_type!r} gives update {update} of {total} the learning rate "
                f"{ratio}: change lr_scheduler_kwargs"
            )


def check_best_metric(recipe: Recipe, rewards: Sequence[Reward] | None) -> str | None:
    """Raise ConfigError if `metric_for_best_model` is no metric of the trainer's evaluation.

    Returns a note where that cannot be known before the evaluation. `rewards`: None if they are not there yet.
    """
    given = recipe.train.metric_for_best_model
    if given is None:
        return None
    known, is_all = metric_names(recipe, rewards)
    try:
        _as_train(lambda: find_metric(given, known))
    except ConfigError:
        if is_all:
            raise
        return (
            f"train.metric_for_best_model={given!r} is not among the metrics that are known before an evaluation; "
            "eval_on_start: true looks for it before the first update"
        )
    return None


def metric_names(recipe: Recipe, rewards: Sequence[Reward] | None) -> tuple[list[str], bool]:
    """Return the metrics of an evaluation, and whether there are no others: losses, rewards and trainers may add some."""
    train = recipe.train
    names, is_all = ["loss", "time"], recipe.algorithm in TRAINERS.discover() and not getattr(train, "loss_args", {})
    if isinstance(train, SFTConfig):
        return [*names, "perplexity", "tokens"], is_all and train.eval_generation is None
    if isinstance(train, RewardConfig):
        return [*names, *_OF_PAIRS], is_all and train.loss_type == "bradley_terry"
    if isinstance(train, DPOConfig):
        return [*names, *_OF_PAIRS, "logps/chosen", "logps/rejected", "kl"], is_all and set(train.loss_type) <= set(
            get_args(LossName)
        )
    if not isinstance(train, OnlineConfig):
        return names, False
    names = ["time", *_OF_GROUPS] if recipe.rewards else ["time", *(name for name in _OF_GROUPS if name[0] == "c")]
    names += ["kl"] if isinstance(train, DistillationConfig) else []
    names += [f"reward/{reward.name}/{what}" for reward in rewards or () for what in _OF_A_REWARD]
    logs = rewards is None or any("log_metric" in reward.parameters for reward in rewards)
    return names, is_all and not logs


def check_folders(recipe: Recipe) -> None:
    """Raise ConfigError if the run folder, or the folder that its `checkpoints` links to, cannot be written."""
    folder = Path(recipe.output_dir)
    _require_writable(folder, "output_dir")
    checkpoints = folder / CHECKPOINTS_FOLDER
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise ConfigError(
            f"output_dir: {str(checkpoints)!r} links to {str(checkpoints.readlink())!r}, which is no folder: make it, or "
            "remove the link"
        )
    _require_writable(checkpoints, "output_dir")
    if recipe.data.cache_dir is not None:
        _require_writable(Path(recipe.data.cache_dir), "data.cache_dir")


def _require_writable(folder: Path, key: str) -> None:
    """Make a folder in the deepest existing folder of a path, and remove it again."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        Path(tempfile.mkdtemp(prefix=".rlqwen-check-", dir=existing)).rmdir()
    except OSError as error:
        where = "" if existing == folder.absolute() else f" in {str(existing)!r}"
        raise ConfigError(f"{key} {str(folder)!r} cannot be written to: {error.strerror}{where}") from None


def _as_train(check: Callable[[], T]) -> T:
    """Call a check, and name the key of its fault as a recipe does."""
    try:
        return check()
    except ConfigError as error:
        raise ConfigError(f"train: {error}" if str(error).startswith("there ") else f"train.{error}") from None
