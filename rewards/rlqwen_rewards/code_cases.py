"""The forms in which datasets give tests for code, as one: statements to run, calls to make, programs to feed."""

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Statements:
    """Test code that passes if it raises nothing; the completion's names are in reach."""

    source: str
    setup: str = ""


@dataclass(frozen=True)
class FunctionCall:
    """What a function must return."""

    function: str
    """Of the module, or of its class `Solution`."""
    arguments: list[Any]
    expected: Any


@dataclass(frozen=True)
class Program:
    """What a program must print, given its standard input."""

    standard_input: str
    expected: str


Case = Statements | FunctionCall | Program


def parse_cases(tests: Any, *, setup: str = "", entry_point: str | None = None) -> list[Case]:
    """The cases of one row; raises ValueError for what is none of the forms.

    A list of statements (MBPP); source with `def check(candidate)` (HumanEval, needs `entry_point`) or plain
    assertions; `{"inputs": [...], "outputs": [...], "fn_name": ...}` or its JSON (APPS, TACO; without a name, standard
    input and output); a list of `{"input": ..., "output": ..., "fn_name": ...}` or its JSON.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # source may begin with a bracket too
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
    """HumanEval defines `check` and leaves the call of it to the judge."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"code_tests: a test is no valid Python ({error}): {source[:80]!r}") from None
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
        raise ValueError(f"code_tests: 'inputs' and 'outputs' must be lists of one length (keys given: {list(tests)})")
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
    if isinstance(given, str):  # LeetCode's form: a JSON value a line
        given = [_json_or_text(line) for line in given.splitlines()]
    arguments = list(given) if isinstance(given, list | tuple) else [given]
    # APPS puts what a function returns into a list of one.
    is_wrapped = is_wrapped and isinstance(expected, list) and len(expected) == 1
    return FunctionCall(function, arguments, expected[0] if is_wrapped else expected)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
