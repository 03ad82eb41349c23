"""Test win rates by hand."""

import pytest

from rlqwen.evaluation.win_rate import wilson_interval, win_rate, win_rates
from rlqwen.types import Completion, Group, Prompt


def group(index: int, *rewards: float | None, weight: float = 2.0) -> Group:
    """Return a group with given rewards."""
    other = [None if value is None else -value for value in rewards]
    scored = Group(Prompt(index, [1], "q"), [Completion([1], [], "stop", "") for _ in rewards], 0)
    scored.rewards = {"quality": list(rewards), "cost": other}
    scored.total_rewards_G = [None if value is None else value - weight * value for value in rewards]
    return scored


def test_the_wilson_interval_equals_its_closed_forms() -> None:
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    z2 = 1.959964**2
    assert wilson_interval(0.0, 5) == pytest.approx((0.0, z2 / (5 + z2)), abs=1e-6)
    assert wilson_interval(1.0, 5) == pytest.approx((5 / (5 + z2), 1.0), abs=1e-6)


def test_ties_count_half_and_missing_values_do_not_count() -> None:
    found = win_rate([([1.0, 0.0], [0.0, 0.0]), ([0.0, None], [1.0, 1.0]), ([1.0, 1.0], [0.5, None])])
    assert (found.wins, found.ties, found.losses, found.missing) == (2, 1, 1, 2)
    assert found.win_rate == (2 + 0.5) / 4
    assert found.interval == wilson_interval(0.625, 3)
    assert (found.mean, found.against_mean) == (2 / 4, 1.5 / 4)


def test_more_samples_per_prompt_do_not_narrow_the_interval() -> None:
    few = win_rate([([1.0], [0.0]), ([0.0], [1.0])])
    many = win_rate([([1.0] * 8, [0.0] * 8), ([0.0] * 8, [1.0] * 8)])
    assert few.interval == many.interval


def test_nothing_to_compare_gives_no_rate() -> None:
    found = win_rate([([None], [1.0])])
    assert (found.missing, found.win_rate, found.interval, found.mean) == (1, None, None, None)


def test_prompts_are_paired_by_index_and_swapping_models_swaps_the_result() -> None:
    ours = [group(0, 1.0), group(1, 2.0), group(2, 9.0)]
    theirs = [group(1, 3.0), group(0, 0.0)]
    rates = win_rates(ours, theirs)
    assert set(rates) == {"quality", "cost", "total"}
    assert (rates["quality"].wins, rates["quality"].losses) == (1, 1)
    # `cost` is the negative of `quality` with twice its weight, so the total is won by the lower quality.
    assert rates["total"].win_rate == rates["cost"].win_rate == 0.5
    ours, theirs = [group(0, 1.0, 5.0)], [group(0, 0.0, 0.0)]
    assert [win_rates(ours, theirs)[name].win_rate for name in ("quality", "cost", "total")] == [1.0, 0.0, 0.0]
    assert [win_rates(theirs, ours)[name].win_rate for name in ("quality", "cost", "total")] == [0.0, 1.0, 1.0]
