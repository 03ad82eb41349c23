"""What `benchmarks/cpu.py` makes of its measurements; tests/docs/test_commands.py runs the script in a small form."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    with mock.patch.dict(os.environ):  # the script quiets libraries by variables
        yield importlib.import_module("cpu_questions.measuring")


@pytest.mark.parametrize(
    ("values", "bar", "at_most", "verdict"),
    [
        ([9.0, 3.0, 4.0], 4.0, False, "met"),
        ([9.0, 3.0, 3.9], 4.0, False, "NOT MET"),
        ([0.04, 0.9, 0.05], 0.05, True, "met"),
        ([0.04, 0.9, 0.06], 0.05, True, "NOT MET"),
        ([9.0], None, False, ""),
    ],
)
def test_the_median_is_held_against_the_bar(
    measuring: Any, values: list[float], bar: float | None, at_most: bool, verdict: str
) -> None:
    assert measuring.Answer("how fast", values, bar, at_most=at_most).verdict == verdict


def test_the_first_alternation_warms_up_and_still_counts_for_losses(measuring: Any) -> None:
    Step = measuring.Step
    theirs = [Step(100.0, 1.0, 2.0), Step(6.0, 1.0, 2.0), Step(8.0, 1.0, 2.0)]
    ours = [Step(1.0, 1.0, 2.5), Step(2.0, 1.0, 2.0), Step(2.0, 1.0, 2.0)]
    pairs = measuring.Pairs(theirs, ours)
    assert pairs.ratios == [3.0, 4.0]
    assert pairs.loss_gap == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("intervals", "free"),
    [
        ([], 10.0),
        ([(0.0, 10.0)], 0.0),
        ([(1.0, 3.0), (2.0, 5.0)], 6.0),
        ([(8.0, 12.0), (-3.0, 1.0), (2.0, 4.0)], 5.0),
        ([(20.0, 30.0)], 10.0),
    ],
)
def test_time_that_no_interval_covers(measuring: Any, intervals: list[tuple[float, float]], free: float) -> None:
    assert measuring.uncovered(0.0, 10.0, intervals) == pytest.approx(free)


def test_missed_bars_leave_the_exit_code_at_0_and_unequal_losses_do_not(
    measuring: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("cpu")
    missed = measuring.Answer("slow", [0.5], 2.0, loss_gap=1e-7)
    unequal = measuring.Answer("wrong", [5.0], 2.0, loss_gap=0.1)

    def breaks(sizes: Any, folder: Path) -> Iterator[Any]:
        yield missed
        raise ValueError("no such thing")

    def run(name: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cpu.py", "--tiny", "--only", name])
        code = script.main()
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    questions = {"slow": lambda *_: iter([missed]), "wrong": lambda *_: iter([unequal]), "broken": breaks}
    monkeypatch.setattr(script, "QUESTIONS", questions)
    code, text = run("slow")
    assert (code, "NOT MET" in text) == (0, True)
    code, text = run("wrong")
    assert (code, "losses differ by more than 0.001: wrong" in text) == (1, True)
    code, text = run("broken,slow")
    assert code == 1
    assert "failed: broken" in text
    assert text.count("slow  ") == 2, "what a question answered before it broke is kept, and the next one is asked"
