"""Test how the best checkpoint is chosen and when early stopping stops."""

from typing import Any

import pytest

from rlqwen.config import SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.trainers.best_checkpoint import BestMetric, Verdict


def follow(values: list[float], key: str = "eval/loss", **options: Any) -> list[str]:
    best = BestMetric(SFTConfig(eval_strategy="steps", **options), key)
    return [best.judge({key: value}).name for value in values]


def test_a_loss_is_better_when_lower_and_a_reward_when_higher() -> None:
    assert follow([3.0, 2.0, 2.5, 1.0]) == ["BEST", "BEST", "WORSE", "BEST"]
    assert follow([3.0, 2.0, 4.0], "eval/reward/mean") == ["BEST", "WORSE", "BEST"]
    assert follow([3.0, 2.0, 4.0], greater_is_better=True) == ["BEST", "WORSE", "BEST"]


def test_patience_counts_evaluations_without_improvement() -> None:
    assert follow([1.0, 2.0, 0.5, 2.0, 2.0], early_stopping_patience=2) == ["BEST", "WORSE", "BEST", "WORSE", "STOP"]
    assert follow([1.0, 0.95], early_stopping_patience=1, early_stopping_threshold=0.1) == ["BEST", "STOP"]


def test_transformers_spelling_of_metric_names_is_accepted() -> None:
    best = BestMetric(SFTConfig(metric_for_best_model="eval_loss"), "eval/reward/mean")
    assert best.judge({"eval/loss": 1.0}) is Verdict.BEST


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'acuracy' is not among .* did you mean 'eval/accuracy'\? there are: eval/acc"
    ):
        BestMetric(SFTConfig(metric_for_best_model="acuracy"), "eval/loss").judge({"eval/accuracy": 1.0})


@pytest.mark.parametrize("name", ["eval/reward/len/mean", "reward/len/mean", "eval_reward_len_mean", "reward_len_mean"])
def test_every_spelling_of_a_metric_is_accepted(name: str) -> None:
    best = BestMetric(SFTConfig(metric_for_best_model=name), "eval/loss")
    assert best.find_key(["eval/loss", "eval/reward/len/mean", "eval/reward/mean"]) == "eval/reward/len/mean"


@pytest.mark.parametrize(
    "key", ["eval/label/unparsable", "eval/completions/truncated", "eval/reward/missing", "eval/time"]
)
def test_what_should_be_rare_or_short_is_better_when_lower(key: str) -> None:
    assert follow([0.5, 0.25, 0.75], key) == ["BEST", "BEST", "WORSE"]


def test_what_is_not_a_number_is_never_the_best() -> None:
    assert follow([float("nan"), 0.1, float("nan"), 0.2], "eval/reward/mean") == ["WORSE", "BEST", "WORSE", "BEST"]
