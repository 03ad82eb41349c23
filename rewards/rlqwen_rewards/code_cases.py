"""Read tests for code from the forms that datasets use: statements, function calls, and programs with input."""

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Statements:
    """Test by statements, which may use the names of the completion's code and pass if they raise nothing."""

    source: str
    setup: str = ""


@dataclass(frozen=True)
class FunctionCall:
    """Test what a function returns."""

    function: str
    """Name of a function of the module, or of a method of its class `Solution`."""
    arguments: list[Any]
    expected: Any


@dataclass(frozen=True)
class Program:
    """Test what a program prints for a standard input."""

    standard_input: str
    expected: str


Case = Statements | FunctionCall | Program


@dataclass(frozen=True)
class CaseColumns:
    """Hold the columns of a dataset that describe tests; one entry per row."""

    tests: Sequence[Any]
    entry_points: Sequence[Any] | None = None
    """Names of the functions under test."""
    setup_code: Sequence[Any] | None = None
    imports: Sequence[Any] | None = None

    def entry_point(self, row: int) -> str | None:
        """Return the name of the function under test, if the row names one."""
        return self.entry_points[row] if self.entry_points else None

    def cases(self, row: int) -> list[Case]:
        """Parse the cases of a row; [] if it has none."""
        tests = self.tests[row]
        setup = "\n".join([*_entries(self.imports, row), *_entries(self.setup_code, row)])
        return parse_cases([] if tests is None else tests, setup=setup, entry_point=self.entry_point(row))


def parse_cases(tests: Any, *, setup: str = "", entry_point: str | None = None) -> list[Case]:
    """Parse the cases of one row; raise ValueError if they have none of the known forms.

    The forms: a list of statements (MBPP); source with `def check(candidate)` (HumanEval, needs `entry_point`) or plain
    assertions; `{"inputs": [...], "outputs": [...], "fn_name": ...}` or its JSON (APPS, TACO; without a name, standard
    input and output); a list of `{"input": ..., "output": ..., "fn_name": ...}` or its JSON.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # source code may also begin with a bracket
            tests = json.loads(tests)
    if isinstance(tests, str):
        return [Statements(_with_check(tests, entry_point), setup)] if tests.strip() else []
    if isinstance(tests, Mapping):
        return _from_columns(tests, entry_point)
    if isinstance(tests, Sequence):
        cases: list[Case] = []
        for test in tests:
            if isinstance(test, str):
                cases.append(Statements(_with_check(test, entry_point), setup))
            elif isinstance(test, Mapping):
                cases.append(_from_pair(test, entry_point))
            else:
                raise ValueError(f"code_tests: a test must be a statement or a mapping (value given: {test!r:.80})")
        return cases
    raise ValueError(f"code_tests: tests must be statements, or inputs and outputs (value given: {tests!r:.80})")


def _with_check(source: str, entry_point: str | None) -> str:
    """Append a call of `check`, which HumanEval's tests define but do not call."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"code_tests: a test is not valid Python ({error}): {source[:80]!r}") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
        return source
    if any(isinstance(node, ast.Expr) and "check(" in ast.unparse(node) for node in tree.body):
        return source
    if not entry_point:
        raise ValueError("code_tests: the tests define `check`, so the row needs a column 'entry_point'")
    return f"{source}\ncheck({entry_point})\n"


def _from_columns(tests: Mapping[str, Any], entry_point: str | None) -> list[Case]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError(
            f"code_tests: 'inputs' and 'outputs' must be lists of the same length (keys given: {list(tests)})"
        )
    function = tests.get("fn_name") or tests.get("func_name")
    return [
        _case(one, expected, function or (entry_point if not isinstance(one, str) else None), is_wrapped=True)
        for one, expected in zip(inputs, outputs, strict=True)
    ]


def _from_pair(test: Mapping[str, Any], entry_point: str | None) -> Case:
    if "input" not in test or "output" not in test:
        raise ValueError(f"code_tests: a test must have 'input' and 'output' (keys given: {list(test)})")
    kind = test.get("testtype") or test.get("type") or ""
    function = test.get("fn_name") or test.get("func_name") or (entry_point if "func" in kind else None)
    if function and isinstance(test["output"], str) and isinstance(test["input"], str):
        return _case(test["input"], _json_or_text(test["output"]), function)
    return _case(test["input"], test["output"], function)


def _case(given: Any, expected: Any, function: str | None, *, is_wrapped: bool = False) -> Case:
    if not function:
        return Program(_lines(given), _lines(expected))
    if isinstance(given, str):  # LeetCode's form: one JSON value per line
        given = [_json_or_text(line) for line in given.splitlines()]
    arguments = list(given) if isinstance(given, list | tuple) else [given]
    # APPS wraps the value that a function returns in a list.
    is_wrapped = is_wrapped and isinstance(expected, list) and len(expected) == 1
    return FunctionCall(function, arguments, expected[0] if is_wrapped else expected)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _entries(column: Sequence[Any] | None, row: int) -> list[str]:
    value = column[row] if column else None
    return [] if not value else [value] if isinstance(value, str) else list(map(str, value))
