"""Test the validation of what rewards return, without worker processes."""

import asyncio
import re
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

from rlqwen.rewards.reward_call import as_list, call, validate


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (None, None),
        (Fraction(1, 4), 0.25),
        (numpy.float32(0.5), 0.5),
        (numpy.bool_(True), 1.0),
        (torch.tensor(2.0), 2.0),
    ],
)
def test_numbers_and_none_are_rewards(value: Any, reward: float | None) -> None:
    assert validate(value) == (reward, None)


@pytest.mark.parametrize(
    ("value", "sign"),
    [
        (float("nan"), "nan, which is not finite"),
        (numpy.float64("-inf"), "-inf, which is not finite"),
        (10**400, "too large"),
        ("0.5", "'0.5', a str"),
        (1j, "1j, a complex"),
        (numpy.ones(2), "a ndarray, instead"),
        ([1.0], "a list"),
    ],
)
def test_other_values_are_invalid_and_explained(value: Any, sign: str) -> None:
    reward, trace = validate(value)
    assert reward is None
    assert trace is not None
    assert re.search(sign, trace)


def test_lists_tuples_and_arrays_are_read_as_lists() -> None:
    assert as_list((1, 2)) == [1, 2]
    assert as_list(torch.tensor([1.0, 2.0])) == [1.0, 2.0]
    assert as_list(numpy.float64(1.0)) is None
    assert as_list("12") is None
    assert as_list({1: 2}) is None


def test_async_rewards_run_inside_a_running_event_loop() -> None:
    async def reward(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(completions))]

    async def as_in_a_notebook() -> Any:
        return call(reward, lambda: {"completions": ["a"]}, 1)

    assert asyncio.run(as_in_a_notebook()).rewards == [1.0]


def test_an_error_while_building_arguments_is_an_error_of_the_call() -> None:
    def arguments() -> dict[str, Any]:
        raise ValueError("a column that only the trainer can read")

    result = call(len, arguments, 2)
    assert result.statuses == ["error", "error"]
    assert not result.is_settled
    assert "a column that only the trainer can read" in str(result.traces[0])
