"""Test advantages, token rewards, GAE and whitening by hand."""

import math

import pytest
import torch

from rlqwen.algorithms.advantages import carries_signal, gae, nan_std, soft_overlong_penalty, token_rewards, whiten
from tests.losses import group_advantages

NAN = math.nan


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 8.0]])
    centered = group_advantages(rewards, scale="none")
    assert centered.tolist() == [[0.5, -0.5, -0.5, 0.5], [-3.0, -1.0, 1.0, 3.0]]
    scaled = group_advantages(rewards, scale="group")
    # Deviations with Bessel's correction: sqrt(1/3) and sqrt(20/3).
    torch.testing.assert_close(scaled[0], centered[0] / (math.sqrt(1 / 3) + 1e-4))
    torch.testing.assert_close(scaled[1], centered[1] / (math.sqrt(20 / 3) + 1e-4))


def test_batch_scale_divides_by_the_deviation_of_all_rewards() -> None:
    rewards = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / (math.sqrt(20 / 3) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), expected)


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]])
    torch.testing.assert_close(group_advantages(rewards, estimator="rloo", scale="none"), expected)


def test_reinforce_pp_whitens_over_the_batch() -> None:
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [0.0, 9.0]]), estimator="reinforce_pp", scale="group")
    assert advantages.mean().abs() < 1e-6
    assert advantages.std().item() == pytest.approx(1, rel=1e-3)
    assert advantages[1, 1] > advantages[0, 1]


@pytest.mark.parametrize("estimator", ["group", "rloo", "reinforce_pp"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_missing_rewards_get_no_advantage_and_do_not_change_the_baseline(estimator: str, scale: str) -> None:
    whole = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]), estimator=estimator, scale=scale)
    with_missing = group_advantages(torch.tensor([[1.0, NAN, 0.0, 0.0]]), estimator=estimator, scale=scale)
    torch.testing.assert_close(with_missing[0, [0, 2, 3]], whole[0])
    assert with_missing[0, 1] == 0


@pytest.mark.parametrize("estimator", ["group", "rloo", "reinforce_pp"])
def test_equal_or_missing_rewards_give_exact_zeros(estimator: str) -> None:
    rewards = torch.tensor([[0.1] * 10 + [NAN], [1.3] * 11, [NAN] * 11])
    # In float32 the mean of ten values of 0.1 differs from 0.1.
    assert rewards[0, :10].mean() != rewards[0, 0]
    assert group_advantages(rewards, estimator=estimator).count_nonzero() == 0


def test_nan_std_of_one_value_is_zero() -> None:
    assert nan_std(torch.tensor([[3.0, NAN]])).tolist() == [[0.0]]


def test_carries_signal() -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [NAN, 1.0], [NAN, NAN]])
    assert carries_signal(rewards).tolist() == [True, False, False, False]


def test_soft_overlong_penalty_by_hand() -> None:
    penalties = [soft_overlong_penalty(length, 100, 20) for length in (50, 80, 90, 100, 120)]
    assert penalties == [0, 0, -0.5, -1, -1]


def test_token_rewards_by_hand() -> None:
    rewards = token_rewards(
        torch.tensor([1.0, -2.0]), torch.tensor([0.1, 0.2, 0.4, -0.5]), torch.tensor([3.0, 1.0]), kl_coef=0.5
    )
    torch.testing.assert_close(rewards, torch.tensor([-0.05, -0.1, 0.8, -1.75]))


def test_gae_by_hand() -> None:
    """Estimate advantages of sequences of three tokens and of one token, with gamma 0.5 and lambda 0.5.

    delta = [0 + 0.5*2 - 1, 0 + 0.5*4 - 2, 1 + 0 - 4] = [0, 0, -3]; A3 = -3, A2 = 0.25 * -3, A1 = 0.25 * A2.
    """
    advantages, returns = gae(
        torch.tensor([0.0, 0.0, 1.0, 3.0]),
        torch.tensor([1.0, 2.0, 4.0, 1.0]),
        torch.tensor([3.0, 1.0]),
        gamma=0.5,
        lam=0.5,
    )
    torch.testing.assert_close(advantages, torch.tensor([-0.1875, -0.75, -3.0, 2.0]))
    torch.testing.assert_close(returns, torch.tensor([0.8125, 1.25, 1.0, 3.0]))


def test_gae_with_lambda_1_is_the_return_minus_the_value() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(9), torch.randn(9)
    advantages, returns = gae(rewards, values, torch.tensor([4.0, 5.0]), gamma=1.0, lam=1.0)
    to_go = torch.cat([rewards[:4].flip(0).cumsum(0).flip(0), rewards[4:].flip(0).cumsum(0).flip(0)])
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)


def test_gae_of_a_sequence_does_not_depend_on_its_neighbors() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(12), torch.randn(12)
    together, _ = gae(rewards, values, torch.tensor([2.0, 7.0, 3.0]), gamma=0.9, lam=0.8)
    alone, _ = gae(rewards[2:9], values[2:9], torch.tensor([7.0]), gamma=0.9, lam=0.8)
    torch.testing.assert_close(together[2:9], alone)


def test_whitening() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    whitened = whiten(values)
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert whitened.std().item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(whiten(values, shift_mean=False), whitened + 3.0)
    assert whiten(torch.tensor([5.0])).tolist() == [5.0]
    assert whiten(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
