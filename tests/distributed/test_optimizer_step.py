"""Test the optimizer step on one process: accumulation, clipping, schedules and non-finite updates."""

from typing import Any

import pytest
import torch
from torch import nn

from rlqwen.config import SFTConfig
from rlqwen.distributed import OptimizerStep, ParameterGroup, warmup_updates
from rlqwen.distributed.optimizer_step import moments_are_finite
from rlqwen.errors import ConfigError, NonFiniteError


def make_optimizer_step(**options: Any) -> Any:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))]
    args = SFTConfig(learning_rate=0.1, **options)
    return OptimizerStep([ParameterGroup("policy", parameters, args.learning_rate)], args, total_updates=10), parameters


def test_parameter_groups_have_their_own_learning_rates_and_norms() -> None:
    policy, critic = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    args = SFTConfig(learning_rate=0.1, max_grad_norm=1.0, lr_scheduler_type="constant")
    optimizer_step = OptimizerStep(
        [ParameterGroup("policy", [policy], 0.1), ParameterGroup("critic", [critic], 0.3)], args, total_updates=10
    )
    optimizer_step.backward(policy.sum() * 3 + critic.sum() * 0.1)
    result = optimizer_step.step()
    assert result.grad_norms == pytest.approx({"policy": 6.0, "critic": 0.2})
    assert result.grad_norm == pytest.approx(6.0)
    torch.testing.assert_close(policy, torch.full((2, 2), 0.9))  # Adam's first step is the rate itself
    torch.testing.assert_close(critic, torch.full((2, 2), 0.7))
    optimizer_step.backward(critic.sum())
    optimizer_step.step()
    torch.testing.assert_close(policy, torch.full((2, 2), 0.9))
    assert critic.max() < 0.7


def test_gradients_of_micro_batches_add_up() -> None:
    results = []
    for split in (1, 2):
        optimizer_step, (weight, _) = make_optimizer_step(max_grad_norm=0)
        for _ in range(split):
            optimizer_step.backward((weight**2).sum() / split)
        norm = optimizer_step.step().grad_norm
        results.append((norm, weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.fault("NaN or infinity in a loss", "the update is skipped: weights and moments bit-unchanged")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_update_changes_no_weight_and_no_moment(bad: float) -> None:
    optimizer_step, parameters = make_optimizer_step()
    optimizer_step.backward((parameters[0] ** 2).sum())
    optimizer_step.step()
    before = [p.detach().clone() for p in parameters]
    moments = [value.clone() for state in optimizer_step.optimizers[0].state.values() for value in state.values()]
    optimizer_step.backward(parameters[0].sum() * bad)
    assert optimizer_step.step().skipped
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    after = [value for state in optimizer_step.optimizers[0].state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_finite_moments_whose_sum_overflows_count_as_finite() -> None:
    optimizer_step, (weight, _) = make_optimizer_step()
    optimizer_step.backward((weight**2).sum())
    optimizer_step.step()
    moment = optimizer_step.optimizers[0].state[weight]["exp_avg_sq"]
    assert moments_are_finite(optimizer_step.optimizers[0])
    moment.fill_(3e38)
    assert moments_are_finite(optimizer_step.optimizers[0])
    moment[0, 0], moment[0, 1] = float("inf"), float("-inf")
    assert not moments_are_finite(optimizer_step.optimizers[0])


@pytest.mark.fault("a non-finite loss, update after update", "the run stops after max_nonfinite_steps of them")
def test_too_many_non_finite_updates_in_a_row_stop_the_run() -> None:
    optimizer_step, (weight, _) = make_optimizer_step(max_nonfinite_steps=2)
    optimizer_step.backward(weight.sum() * float("nan"))
    optimizer_step.step()
    optimizer_step.backward(weight.sum())
    assert not optimizer_step.step().skipped
    optimizer_step.backward(weight.sum() * float("nan"))
    optimizer_step.step()
    optimizer_step.backward(weight.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="2 updates in a row"):
        optimizer_step.step()


def test_an_update_without_gradient_still_moves_by_momentum() -> None:
    optimizer_step, (weight, _) = make_optimizer_step()
    optimizer_step.backward((weight**2).sum())
    optimizer_step.step()
    before = weight.detach().clone()
    assert optimizer_step.step().grad_norm == 0
    assert not torch.equal(before, weight)


def test_the_reported_norm_is_that_before_clipping() -> None:
    optimizer_step, (weight, _) = make_optimizer_step(max_grad_norm=1e-3)
    optimizer_step.backward((weight * 100).sum())
    assert optimizer_step.step().grad_norm == pytest.approx(300)


def test_vectors_get_no_weight_decay() -> None:
    optimizer_step, _ = make_optimizer_step(weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer_step.optimizers[0].param_groups] == [0.1, 0.0]


def test_the_schedule_warms_up_and_decays_to_zero() -> None:
    optimizer_step, (weight, _) = make_optimizer_step(warmup_steps=2)
    rates = []
    for _ in range(10):
        optimizer_step.backward(weight.sum())
        rates.append(optimizer_step.step().lr)
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    assert rates[-1] == pytest.approx(0.1 / 8)


def test_warmup_is_a_count_or_a_fraction() -> None:
    assert warmup_updates(SFTConfig(warmup_steps=7), 100) == 7
    assert warmup_updates(SFTConfig(warmup_steps=0.1), 100) == 10
    assert warmup_updates(SFTConfig(warmup_ratio=0.05), 100) == 5


def test_a_frozen_model_and_an_unknown_schedule_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        OptimizerStep([ParameterGroup("policy", [], 0.1)], SFTConfig(), total_updates=1)
    with pytest.raises(ConfigError, match="unknown schedule 'sinus'"):
        make_optimizer_step(lr_scheduler_type="sinus")
