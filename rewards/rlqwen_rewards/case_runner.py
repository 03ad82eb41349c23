"""Run code on test cases and count those that pass."""

import ast
import math
from collections.abc import Sequence
from typing import Any

from rlqwen_rewards.code_cases import Case, Program, Statements
from rlqwen_rewards.confined.values import encode
from rlqwen_rewards.confined_process import Ended, Limits, ProgramRun, Trial

_RELATIVE_TOLERANCE = 1e-6


def run_cases(
    code: str,
    cases: Sequence[Case],
    python: Sequence[str],
    limits: Limits,
    *,
    entry_point: str | None = None,
    helpers: str = "",
    stop_at_failure: bool = False,
) -> int:
    """Return how many cases pass.

    Args:
        code: of the completion.
        cases: the tests.
        python: the command that starts a confined interpreter.
        limits: of each process.
        entry_point: the function under test, if the row names it.
        helpers: source that defines what tests use besides that function; a prompt as in HumanEval.
        stop_at_failure: whether to return at the first case that does not pass.
    """
    try:
        code.encode()
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0
    tests = [_encoded(case) for case in cases if not isinstance(case, Program)]
    job = {"code": code, "entry_point": entry_point, "helpers": helpers, "cases": tests}
    num_passed = 0
    trial = Trial(python, limits, job) if tests else None
    try:
        for case in cases:
            try:
                passes = (
                    _passes(code, case, python, limits)
                    if trial is None or isinstance(case, Program)
                    else trial.next_passes()
                )
            except Ended as end:
                if not isinstance(case, Program) or str(end) == "out of time":
                    return num_passed
                passes = False
            if not passes and stop_at_failure:
                return num_passed
            num_passed += passes
    finally:
        if trial is not None:
            trial.close()
    return num_passed


def _passes(code: str, case: Case, python: Sequence[str], limits: Limits) -> bool:
    assert isinstance(case, Program)
    with ProgramRun(python, limits) as run:
        return same_text(run.printed(code, case.standard_input), case.expected)


def _encoded(case: Case) -> list[Any]:
    """Return what the process of the tests reads."""
    assert not isinstance(case, Program)
    if isinstance(case, Statements):
        return ["statements", case.setup, case.source]
    return ["call", case.function, encode(case.arguments, _not_plain), encode(case.expected, _not_plain)]


def _not_plain(value: Any) -> Any:
    raise ValueError(f"code_tests: a test has a {type(value).__name__}; arguments and results must be plain data")


def same_text(printed: str, expected: str) -> bool:
    """Compare texts line by line, word by word; numbers with a decimal point may differ in the last digits."""
    given, wanted = ([line.split() for line in text.strip().splitlines()] for text in (printed, expected))
    if len(given) != len(wanted):
        return False
    return all(len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(given, wanted, strict=True))


def _same_word(word: str, expected: str) -> bool:
    if word == expected or "." not in expected:
        return word == expected
    try:
        return math.isclose(float(word), float(expected), rel_tol=_RELATIVE_TOLERANCE)
    except ValueError:
        return False
