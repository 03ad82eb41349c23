import pytest

from rlqwen.config import SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.trainers.best import BestMetric, Verdict


def follow(values, key="eval/loss", **options):
    best = BestMetric(SFTConfig(eval_strategy="steps", **options), key)
    return [best.judge({key: value}).name for value in values]


def test_a_loss_is_better_when_lower_and_a_reward_when_higher():
    assert follow([3.0, 2.0, 2.5, 1.0]) == ["BEST", "BEST", "WORSE", "BEST"]
    assert follow([3.0, 2.0, 4.0], "eval/reward/mean") == ["BEST", "WORSE", "BEST"]
    assert follow([3.0, 2.0, 4.0], greater_is_better=True) == ["BEST", "WORSE", "BEST"]


def test_patience_counts_evaluations_without_improvement():
    assert follow([1.0, 2.0, 0.5, 2.0, 2.0], early_stopping_patience=2) == ["BEST", "WORSE", "BEST", "WORSE", "STOP"]
    assert follow([1.0, 0.95], early_stopping_patience=1, early_stopping_threshold=0.1) == ["BEST", "STOP"]


def test_names_as_transformers_spells_them_are_understood():
    best = BestMetric(SFTConfig(metric_for_best_model="eval_loss"), "eval/reward/mean")
    assert best.judge({"eval/loss": 1.0}) is Verdict.BEST


def test_an_unknown_metric_names_those_there_are():
    with pytest.raises(ConfigError, match="'acuracy' is not among the evaluation's figures: eval/loss"):
        BestMetric(SFTConfig(metric_for_best_model="acuracy"), "eval/loss").judge({"eval/loss": 1.0})
