"""Test losses, normalizers and advantage estimators that a config names, and their metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlqwen.algorithms.loss_metrics import MetricSums, maximum, sequence_mean, token_mean, total
from rlqwen.algorithms.losses import GRPOLoss, LossCall, Totals
from rlqwen.config import DPOConfig, GRPOConfig, SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from tests.trainers.test_grpo import make_trainer, steps
from tests.trainers.test_sft import make_trainer as make_sft

SOFT_CLIP = '''
import torch
from rlqwen.algorithms.loss_metrics import maximum, token_mean


def soft_clip(ratio, advantage, epsilon, sharpness):
    """Move the ratio smoothly to the edge of the trust region."""
    bounded = 1 + epsilon * torch.tanh((ratio - 1) / epsilon * sharpness) / sharpness
    return -bounded * advantage, {"ratio/mean": token_mean(ratio), "ratio/max": maximum(ratio)}


def by_length(rewards, lengths):
    """Subtract the group's mean reward per token."""
    rates = rewards / lengths.clamp(min=1)
    return rates - rates.mean(1, keepdim=True)


def needs_values(ratio, value, margin=0.0):
    return -ratio * value


def half(sequence, num_tokens):
    """Weight every token by half of 1 / num_tokens."""
    return torch.full((len(sequence),), 0.5 / num_tokens)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "plugin.py"
    file.write_text(SOFT_CLIP)
    return file


def batch_of(lengths: tuple[int, int], advantages: tuple[float, float]) -> PackedBatch:
    branches = [
        Branch([7] * length, per_token={"sampler_logp": [-1.0] * length}, per_sequence={"advantage": advantage})
        for length, advantage in zip(lengths, advantages, strict=True)
    ]
    return pack([Tree([1, 2], branches)])


def test_cispo_with_the_normalizer_of_dr_grpo_by_hand() -> None:
    """Cap the ratios 1 and e at 2: -(1 * 1 * -1 + 2 * -0.5 * 0) over 2 completions of at most 4 tokens."""
    config = GRPOConfig(
        loss_type="cispo",
        loss_normalizer="constant_length",
        epsilon_high=2.0,
        max_completion_length=4,
        vllm_importance_sampling_correction=False,
    )
    batch = batch_of((1, 1), (1.0, -0.5))
    batch.per_token["old_logp"] = torch.tensor([-1.0, -1.0])
    logp = torch.tensor([-1.0, 0.0], requires_grad=True)
    loss, metrics = GRPOLoss(config)(logp, None, batch, Totals(tokens=2, sequences=2))
    assert loss.item() == pytest.approx((1.0 * 1.0 + 0.0) / 8)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-1.0 / 8, 2 * 0.5 / 8])
    assert metrics["clip_ratio"].value.item() == 0  # the second ratio is above the cap, but its advantage is negative


@pytest.mark.parametrize(
    ("loss_type", "surrogate", "normalizer"),
    [
        ("grpo", "clipped", "sequence_mean"),
        ("dapo", "clipped", "token_mean"),
        ("bnpo", "clipped", "token_mean"),
        ("dr_grpo", "clipped", "constant_length"),
        ("cispo", "cispo", "token_mean"),
        ("clipped", "clipped", "token_mean"),
    ],
)
def test_names_of_trl_are_presets(loss_type: str, surrogate: str, normalizer: str) -> None:
    config = GRPOConfig(loss_type=loss_type)
    assert (config.surrogate, config.normalizer) == (surrogate, normalizer)
    assert GRPOConfig(loss_type=loss_type, loss_normalizer="sequence_mean").normalizer == "sequence_mean"


def test_a_loss_a_normalizer_and_an_estimator_from_a_file_train(
    tiny_model_path: Path, tmp_path: Path, plugin: Path
) -> None:
    trainer = make_trainer(
        tiny_model_path,
        tmp_path / "run",
        loss_type=f"{plugin}:soft_clip",
        loss_args={"sharpness": 2.0},
        loss_normalizer=f"{plugin}:half",
        advantage_estimator=f"{plugin}:by_length",
        num_iterations=2,
        max_steps=4,
    )
    trainer.train()
    for metrics in trainer.state.log_history[:2]:
        assert metrics["ratio/max"] >= metrics["ratio/mean"] > 0
    assert any(steps(trainer))


def test_a_token_loss_from_a_file_trains_with_sft(tiny_model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "focal.py"
    file.write_text("def focal(logp, gamma=2.0):\n    return -(1 - logp.detach().exp()) ** gamma * logp\n")
    plain = make_sft(tiny_model_path, tmp_path / "plain", max_steps=1)
    focal = make_sft(
        tiny_model_path, tmp_path / "focal", max_steps=1, loss_type=f"{file}:focal", loss_args={"gamma": 1}
    )
    plain.train()
    focal.train()
    assert 0 < focal.state.log_history[0]["loss"] < plain.state.log_history[0]["loss"]


def test_a_missing_input_is_refused_when_the_trainer_is_built(
    tiny_model_path: Path, tmp_path: Path, plugin: Path
) -> None:
    with pytest.raises(ConfigError, match=r"loss 'needs_values' .* needs 'value'.* \(logp, old_logp, log_ratio, ratio"):
        make_trainer(tiny_model_path, tmp_path / "run", loss_type=f"{plugin}:needs_values")


def test_an_argument_that_the_loss_does_not_take_is_refused(plugin: Path) -> None:
    with pytest.raises(ConfigError, match=r"no argument 'sharpnes'; did you mean 'sharpness'"):
        LossCall(
            f"{plugin}:soft_clip",
            inputs=("ratio", "advantage"),
            settings={"epsilon": 0.2},
            arguments={"sharpnes": 1},
        )


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        (GRPOConfig, {"loss_type": "cliped"}, "loss_type: unknown loss 'cliped'; did you mean 'clipped'"),
        (GRPOConfig, {"loss_normalizer": "token"}, "loss_normalizer: unknown normalizer 'token'"),
        (GRPOConfig, {"advantage_estimator": "rlo"}, "advantage_estimator: .*did you mean 'rloo'"),
        (SFTConfig, {"loss_type": "nl"}, "loss_type: unknown loss 'nl'; did you mean 'nll'"),
        (DPOConfig, {"loss_args": {"ipo": {}}}, "loss_args: 'ipo' is not among loss_type sigmoid"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(config: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**options)


def test_metrics_follow_their_reduction_over_micro_batches_and_ranks() -> None:
    collected = MetricSums()
    for values in (torch.tensor([1.0, 2.0]), torch.tensor([3.0])):
        collected.add({"a": token_mean(values), "b": sequence_mean(values), "c": total(values), "d": maximum(values)})
    other = MetricSums()
    other.add({"a": token_mean(torch.tensor([6.0])), "d": maximum(torch.tensor([9.0])), "e": total(torch.ones(2))})
    reduced = collected.reduce(lambda own: [own, other.sums], tokens=4, sequences=3)
    assert reduced == {"a": 3.0, "b": 2.0, "c": 6.0, "d": 9.0, "e": 2.0}


def test_the_maximum_of_no_values_is_ignored() -> None:
    collected = MetricSums()
    collected.add({"d": maximum(torch.tensor([]))})
    collected.add({"d": maximum(torch.tensor([-2.0]))})
    assert collected.reduce(lambda own: [own], tokens=1, sequences=1) == {"d": -2.0}
