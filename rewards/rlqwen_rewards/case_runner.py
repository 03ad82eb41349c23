"""Run code on test cases and compare its results with the expected ones."""

import ast
import builtins
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlqwen_rewards.candidate_process import Candidate, CandidateEnded, Limits, Remote
from rlqwen_rewards.code_cases import Case, FunctionCall, Program, Statements

_RELATIVE_TOLERANCE = 1e-6


def run_cases(
    code: str, cases: Sequence[Case], python: Sequence[str], limits: Limits, *, stop_at_failure: bool = False
) -> int:
    """Return how many cases pass. `python` is the command that starts the interpreter for the code."""
    try:
        code.encode()
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0
    num_passed = 0
    loaded: Candidate | None = None
    try:
        for case in cases:
            try:
                if isinstance(case, Program):
                    with Candidate(python, limits, is_program=True) as one:
                        passes = same_text(one.run_program(code, case.standard_input), case.expected)
                else:
                    if loaded is None:
                        loaded = Candidate(python, limits, is_program=False)
                        loaded.begin()
                        loaded.ask("load", code)
                    loaded.begin()
                    passes = _passes(case, partial(loaded.ask, "get", 0)) and not loaded.has_ended
            except CandidateEnded as end:
                if loaded is not None or end.args == ("out of time",):
                    return num_passed
                passes = False
            except Exception:  # the test failed, or the code does not load
                if loaded is None:
                    raise
                passes = False
            if not passes and (stop_at_failure or (loaded is not None and loaded.has_ended)):
                return num_passed
            num_passed += passes
    finally:
        if loaded is not None:
            loaded.close()
    return num_passed


def _passes(case: Statements | FunctionCall, name_of_code: Callable[[str], Any]) -> bool:
    if isinstance(case, Statements):
        names = _Names(name_of_code)
        exec(compile(case.setup, "<setup>", "exec"), names, names)  # noqa: S102
        exec(compile(case.source, "<test>", "exec"), names, names)  # noqa: S102
        return True
    try:
        function = name_of_code(case.function)
    except AttributeError:
        function = getattr(name_of_code("Solution")(), case.function)
    return same_value(function(*case.arguments), case.expected)


class _Names(dict[str, Any]):
    """Resolve names in a test: the test's own, Python's built-ins, then the code's, fetched from its process."""

    def __init__(self, name_of_code: Callable[[str], Any]) -> None:
        super().__init__(__name__="test", __builtins__=builtins)
        self._name_of_code = name_of_code

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # Python then looks in the built-ins
        try:
            return self._name_of_code(name)
        except AttributeError:
            raise KeyError(name) from None


def same_value(value: Any, expected: Any) -> bool:
    """Compare plain data as JSON would: tuples equal lists, and floats may differ in the last digits."""
    if isinstance(value, Remote):
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        given, wanted = ({str(key): one for key, one in content.items()} for content in (value, expected))
        return given.keys() == wanted.keys() and all(same_value(given[key], wanted[key]) for key in given)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(value, expected, rel_tol=_RELATIVE_TOLERANCE)
    return type(value) is type(expected) and bool(value == expected)


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
