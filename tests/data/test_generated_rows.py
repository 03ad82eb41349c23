"""Test the arithmetic generator: disjoint splits, and a teacher with the configured error rate."""

import re
from typing import Any

import pytest

from rlqwen.data.generated_rows import generate
from rlqwen.errors import ConfigError, DataError
from tests.narrowing import present


def operands(row: dict[str, Any]) -> tuple[int, int]:
    turns = row.get("messages") or row["prompt"]
    a, b = present(re.fullmatch(r"(\d\d) \+ (\d\d) = \?", turns[0]["content"])).groups()
    return int(a), int(b)


def answer(row: dict[str, Any]) -> int:
    return int(present(re.search(r"\\boxed\{(-?\d+)\}$", row["messages"][1]["content"]))[1])


def test_splits_share_no_sum_or_mirrored_sum_for_any_arguments() -> None:
    train = {frozenset(operands(row)) for seed in (0, 1) for row in generate("arithmetic", {"seed": seed})}
    taught = {frozenset(operands(row)) for row in generate("arithmetic", {"kind": "sft", "seed": 5})}
    held_out = {frozenset(operands(row)) for row in generate("arithmetic", {"split": "eval", "seed": 3})}
    assert train == taught
    assert not train & held_out
    assert len(train | held_out) == 90 * 91 // 2
    assert len(held_out) == 410  # a tenth of 4,095, rounded


def test_every_sum_of_a_split_appears_once_before_any_repeats() -> None:
    rows = generate("arithmetic", {})
    assert len({operands(row) for row in rows}) == len(rows)
    more = generate("arithmetic", {"size": len(rows) + 10})
    assert len(more) == len(rows) + 10
    assert {operands(row) for row in more[: len(rows)]} == {operands(row) for row in rows}


def test_solutions_are_correct_and_the_same_seed_gives_the_same_rows() -> None:
    rows = generate("arithmetic", {"size": 50, "seed": 1})
    assert all(int(row["solution"]) == sum(operands(row)) for row in rows)
    assert rows == generate("arithmetic", {"size": 50, "seed": 1})
    assert rows != generate("arithmetic", {"size": 50, "seed": 2})


def test_teacher_errors_are_one_or_ten_at_the_configured_rate() -> None:
    rows = generate("arithmetic", {"kind": "sft", "teacher_error": 0.4})
    slips = [answer(row) - int(row["solution"]) for row in rows]
    assert set(slips) == {-10, -1, 0, 1, 10}
    assert sum(slip != 0 for slip in slips) / len(slips) == pytest.approx(0.4, abs=0.02)
    for size in (-10, -1, 1, 10):
        assert slips.count(size) / len(slips) == pytest.approx(0.1, abs=0.015)
    assert all(
        answer(row) == int(row["solution"]) for row in generate("arithmetic", {"kind": "sft", "teacher_error": 0})
    )


def test_the_calculation_of_the_think_style_leads_to_its_answer() -> None:
    rows = generate("arithmetic", {"kind": "sft", "style": "think", "size": 300})
    for row in rows:
        text = row["messages"][1]["content"]
        match = re.fullmatch(r"<think>\n(\d+) \+ (-?\d+) = (\d+)\n</think>\n\n\\boxed\{(\d+)\}", text)
        tens, ones, *last = map(int, present(match).groups())
        assert last == [tens + ones, tens + ones]


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'teacher_error'"):
        generate("arithmetic", {"teacher_eror": 0.2})
    with pytest.raises(ConfigError, match=r"generator arithmetic: split: .*'test'"):
        generate("arithmetic", {"split": "test"})
    with pytest.raises(DataError, match="did you mean 'arithmetic'"):
        generate("arithmetics", {})
    with pytest.raises(DataError, match=r"size=5000, but split 'eval' has only 8\d\d sums"):
        generate("arithmetic", {"split": "eval", "size": 5000})


def test_a_smaller_max_digit_gives_fewer_sums_and_disjoint_splits() -> None:
    train = {operands(row) for row in generate("arithmetic", {"max_digit": 3})}
    held_out = {operands(row) for row in generate("arithmetic", {"max_digit": 3, "split": "eval"})}
    numbers = {number for pair in train | held_out for number in pair}
    assert numbers == {10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33}
    assert len(train | held_out) == 12 * 12
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in held_out}


def test_an_error_in_the_answer_leaves_the_calculation_correct() -> None:
    rows = generate(
        "arithmetic", {"kind": "sft", "style": "think", "slip_in": "answer", "teacher_error": 1.0, "size": 50}
    )
    for row in rows:
        result = present(re.search(r" = (\d+)\n</think>", row["messages"][1]["content"]))[1]
        assert result == row["solution"] != str(answer(row))
