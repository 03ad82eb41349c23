"""Does a completion's Python pass the tests?"""

import ast
import builtins
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from rlqwen_rewards.answers import final_text, texts_of
from rlqwen_rewards.candidate_process import Candidate, CandidateEnded, Limits, Remote
from rlqwen_rewards.code_cases import Case, FunctionCall, Program, Statements, parse_cases

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_MAX_PARALLEL = 4
_RELATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CodeTests:
    """1 if the code (the last fenced block, or else all) passes every test of column `tests`, or its share of them.

    Tests in the forms of MBPP, HumanEval, APPS and TACO: columns `tests`, `test_list`, `test` or `input_output`, with
    `entry_point`, `test_setup_code` and `test_imports` where there are any. None where a row has no tests. Runs
    isolated; the code runs in a process of its own that never holds what is expected, and can neither start a process
    or a thread nor write a file. After a test that ran out of time or ended the process, the others count as failed.
    """

    all_or_nothing: bool = True
    timeout: float = 4.0
    """Seconds for each test."""
    memory_mib: int = 512

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("tests", "test_list", "test", "input_output"),)
    isolated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.timeout < math.inf and self.memory_mib > 0):
            raise ValueError(f"timeout and memory_mib must be positive: {self.timeout}, {self.memory_mib}")

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        tests: Sequence[Any] | None = None,
        test_list: Sequence[Any] | None = None,
        test: Sequence[Any] | None = None,
        input_output: Sequence[Any] | None = None,
        entry_point: Sequence[Any] | None = None,
        test_setup_code: Sequence[Any] | None = None,
        test_imports: Sequence[Any] | None = None,
        prompt_opens_reasoning: Sequence[bool] | None = None,
        confined_python: list[str] | None = None,
    ) -> list[float | None]:
        if confined_python is None:
            raise RuntimeError("code_tests runs what a model wrote, so it is called only by rlqwen's isolated workers")
        given = next((column for column in (tests, test_list, test, input_output) if column is not None), None)
        if given is None:
            raise ValueError("code_tests needs a column 'tests', 'test_list', 'test' or 'input_output'")

        texts = texts_of(completions, prompts, prompt_opens_reasoning)

        def score(i: int) -> float | None:
            entry = entry_point[i] if entry_point else None
            setup = "\n".join([*_lines(test_imports, i), *_lines(test_setup_code, i)])
            cases = parse_cases(given[i] if given[i] is not None else [], setup=setup, entry_point=entry)
            if not cases:
                return None
            code = code_of(texts[i], prompts[i], entry)
            return self._score(code, cases, confined_python) if code else 0.0

        with ThreadPoolExecutor(min(_MAX_PARALLEL, os.cpu_count() or 1)) as pool:
            return list(pool.map(score, range(len(completions))))

    def _score(self, code: str, cases: list[Case], python: list[str]) -> float:
        cpu_seconds = math.ceil(self.timeout * len(cases)) + 2
        limits = Limits(self.timeout, self.memory_mib << 20, cpu_seconds)
        passed = run_cases(code, cases, python, limits, stop_at_failure=self.all_or_nothing)
        return float(passed == len(cases)) if self.all_or_nothing else passed / len(cases)


def code_of(completion: str, prompt: Any = None, entry_point: str | None = None) -> str:
    """The last fenced block, or all that follows the reasoning; empty if the reasoning was never closed.

    Where that does not define `entry_point` and the prompt is text, as HumanEval's, it continues the prompt.
    """
    text = final_text(completion)
    if text is None:
        return ""
    fenced = [match[2] for match in _FENCE.finditer(text) if match[1].lower() in ("", "py", "python", "python3")]
    code = fenced[-1] if fenced else "" if "```" in text else text
    if entry_point and isinstance(prompt, str) and not re.search(rf"\b(def|class)\s+{re.escape(entry_point)}\b", code):
        return prompt + code
    return code


def run_cases(
    code: str, cases: Sequence[Case], python: Sequence[str], limits: Limits, *, stop_at_failure: bool = False
) -> int:
    """How many of the cases pass; `python` starts the interpreter that runs the code."""
    try:
        code.encode()
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0  # without starting a process
    passed = 0
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
                    return passed
                passes = False
            except Exception:  # the test failed, or the code does not load
                if loaded is None:
                    raise
                passes = False
            if not passes and (stop_at_failure or (loaded is not None and loaded.has_ended)):
                return passed
            passed += passes
    finally:
        if loaded is not None:
            loaded.close()
    return passed


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
    """Names that a test sees: its own, Python's, and then the code's, fetched from its process when asked for."""

    def __init__(self, name_of_code: Callable[[str], Any]) -> None:
        super().__init__(__name__="test", __builtins__=builtins)
        self._name_of_code = name_of_code

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)  # Python looks there next
        try:
            return self._name_of_code(name)
        except AttributeError:
            raise KeyError(name) from None


def same_value(value: Any, expected: Any) -> bool:
    """Equality of plain data as JSON has it: tuples are lists, and floats may differ in the last digits."""
    if isinstance(value, Remote):
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        mine, theirs = ({str(key): one for key, one in content.items()} for content in (value, expected))
        return mine.keys() == theirs.keys() and all(same_value(mine[key], theirs[key]) for key in mine)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(value, expected, rel_tol=_RELATIVE_TOLERANCE)
    return type(value) is type(expected) and bool(value == expected)


def same_text(printed: str, expected: str) -> bool:
    """Equality line by line, white space at the ends aside; numbers with a point may differ in the last digits."""
    mine, theirs = ([line.split() for line in text.strip().splitlines()] for text in (printed, expected))
    if len(mine) != len(theirs):
        return False
    return all(len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(mine, theirs, strict=True))


def _same_word(word: str, expected: str) -> bool:
    if word == expected or "." not in expected:
        return word == expected
    try:
        return math.isclose(float(word), float(expected), rel_tol=_RELATIVE_TOLERANCE)
    except ValueError:
        return False


def _lines(column: Sequence[Any] | None, i: int) -> list[str]:
    value = column[i] if column else None
    return [] if not value else [value] if isinstance(value, str) else list(map(str, value))
