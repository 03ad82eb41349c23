"""Reward completions whose Python code passes tests."""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from rlqwen_rewards.answers import final_text, texts_of
from rlqwen_rewards.case_runner import run_cases
from rlqwen_rewards.code_cases import Case, CaseColumns
from rlqwen_rewards.confined_process import Limits

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_MAX_PARALLEL = 4


@dataclass(frozen=True)
class CodeTests:
    """Score 1 if the code (the last fenced block, else all text) passes every test of column `tests`; 0 if not.

    With `all_or_nothing=False` the score is the share of tests that pass. None if a row has no tests.

    Tests have the forms of MBPP, HumanEval, APPS and TACO: columns `tests`, `test_list`, `test` or `input_output`, with
    `entry_point`, `test_setup_code` and `test_imports` if there are any. The reward runs isolated. The code and the tests
    run in a process each, which can neither start a process or thread nor write a file; the one of the code never holds
    the expected results. After a test that runs out of time or ends the process, the remaining tests count as failed.
    """

    all_or_nothing: bool = True
    timeout: float = 4.0
    """Seconds per test."""
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
        # Every column is a parameter of its own, because only columns that the signature names are passed.
        if confined_python is None:
            raise RuntimeError("code_tests runs what a model wrote, so it is called only by rlqwen's isolated workers")
        given = next((column for column in (tests, test_list, test, input_output) if column is not None), None)
        if given is None:
            raise ValueError("code_tests needs a column 'tests', 'test_list', 'test' or 'input_output'")
        columns = CaseColumns(given, entry_point, test_setup_code, test_imports)
        texts = texts_of(completions, prompts, prompt_opens_reasoning)

        def score(row: int) -> float | None:
            cases = columns.cases(row)
            if not cases:
                return None
            name = columns.entry_point(row)
            helpers = prompts[row] if name and isinstance(prompts[row], str) else ""
            code = code_of(texts[row], prompts[row], name)
            return self._score(code, cases, confined_python, name, helpers) if code else 0.0

        with ThreadPoolExecutor(min(_MAX_PARALLEL, os.cpu_count() or 1)) as pool:
            return list(pool.map(score, range(len(completions))))

    def _score(self, code: str, cases: list[Case], python: list[str], entry_point: str | None, helpers: str) -> float:
        cpu_seconds = math.ceil(self.timeout * len(cases)) + 2
        limits = Limits(self.timeout, self.memory_mib << 20, cpu_seconds)
        num_passed = run_cases(
            code, cases, python, limits, entry_point=entry_point, helpers=helpers, stop_at_failure=self.all_or_nothing
        )
        return float(num_passed == len(cases)) if self.all_or_nothing else num_passed / len(cases)


def code_of(completion: str, prompt: Any = None, entry_point: str | None = None) -> str:
    """Return the last fenced block, or all text after the reasoning; empty if the reasoning was never closed.

    If that does not define `entry_point` and the prompt is text, as in HumanEval, the code is prompt and completion.
    """
    text = final_text(completion)
    if text is None:
        return ""
    fenced = [match[2] for match in _FENCE.finditer(text) if match[1].lower() in ("", "py", "python", "python3")]
    code = fenced[-1] if fenced else "" if "```" in text else text
    if entry_point and isinstance(prompt, str) and not re.search(rf"\b(def|class)\s+{re.escape(entry_point)}\b", code):
        return prompt + code
    return code
