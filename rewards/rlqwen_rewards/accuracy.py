"""Is the final answer right? Graded by math-verify, which knows LaTeX, fractions, units, sets and intervals."""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from math_verify import (  # type: ignore[import-untyped]
    ExprExtractionConfig,
    LatexExtractionConfig,
    LatexNormalizationConfig,
    parse,
    verify,
)
from math_verify.errors import TimeoutException  # type: ignore[import-untyped]

from rlqwen_rewards.answers import final_text, marked_answer, solutions_of, text_of

# It warns that timeouts are off in threads, where signals cannot raise; the caller's own deadline holds there.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_TIMEOUT = 3  # seconds for one parse or one comparison; an ordinary one takes milliseconds

_LONGEST_ANSWER = 1000
_TAIL = 2000
"""Characters at the end of a text in which an unmarked answer is looked for; a degenerate text costs seconds else."""

_NORMALIZATION = LatexNormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all", equations=False
)
_ANCHORED: tuple[Any, ...] = (
    LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=_NORMALIZATION
    ),
)
_PLAIN: tuple[Any, ...] = (
    LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION),
    ExprExtractionConfig(),
)

_NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,15})"
_INTEGER = re.compile(_NUMBER)
_INTEGER_WITH_UNIT = re.compile(rf"({_NUMBER})\s*[A-Za-z]{{3,}}(?:\s+[A-Za-z]+){{0,2}}")
_SCALES = re.compile(r"hundred|thousand|million|billion|trillion|dozen|percent|pct|half|third|quarter", re.IGNORECASE)
_SPACING = re.compile(r"\\[,!;: ]|\{,\}|~")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Z]|[^\W\d_]{3,}(?:[ '-][^\W\d_]+){0,3}")
_BARE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def grade(text: str, solution: Any, *, plain: bool = False) -> float | None:
    """1.0 if the answer in `text` equals the solution, 0.0 if not or if there is none.

    None if the solution itself cannot be read, or if the comparison ran out of time. `plain` also takes an answer
    that nothing marks: the last formula or number of the text. An answer of over 1,000 characters is no answer. A solution may be a list of which any will do.
    """
    if isinstance(solution, list | tuple):
        grades = [grade(text, one, plain=plain) for one in solution]
        return max((one for one in grades if one is not None), default=None)
    gold_text = str(solution).strip()
    gold = _unmark(gold_text)
    answer = marked_answer(text)
    if answer is not None:
        quick = _compare_integers(gold, answer)
        if quick is not None:
            return quick
        if len(answer) > max(_LONGEST_ANSWER, 2 * len(gold)):
            return 0.0
    words = _words(gold)
    if words is not None:
        return float(answer is not None and _plain_text(answer) == words)
    try:
        return _grade_with_math_verify(gold_text, text, answer, plain)
    except TimeoutException:
        return None


def _grade_with_math_verify(gold_text: str, text: str, answer: str | None, plain: bool) -> float | None:
    timeout = _TIMEOUT if threading.current_thread() is threading.main_thread() else None
    golds = _parse_gold(gold_text, timeout)
    if not golds:
        return None
    if answer is not None:
        targets = _parse(rf"\boxed{{{answer.rstrip('.')}}}", _ANCHORED, timeout)
    else:
        targets = _parse(text[-_TAIL:], _PLAIN if plain else _ANCHORED, timeout)
    return float(any(_equal(gold, target, timeout) for gold in golds for target in targets))


def _parse(text: str, configs: Sequence[Any], timeout: int | None) -> list[Any]:
    """Formulas in `text`, as SymPy objects and strings; empty if there are none. Raises TimeoutException."""
    try:
        found: list[Any] = parse(
            text, configs, extraction_mode="first_match", parsing_timeout=timeout, raise_on_error=True
        )
    except Exception:  # noqa: BLE001 - SymPy and ANTLR raise anything on malformed input
        return []
    return found


def _equal(gold: Any, target: Any, timeout: int | None) -> bool:
    try:
        return bool(verify(gold, target, timeout_seconds=timeout, raise_on_error=True))
    except Exception:  # noqa: BLE001 - SymPy cannot compare them
        return False


@lru_cache(maxsize=4096)
def _parse_gold(text: str, timeout: int | None) -> tuple[Any, ...]:
    r"""The right answer. Taken bare, `2\sqrt{3}` would be read as 2 and `x^2+1` not at all, so it is boxed first;
    prose such as `72 clips` is searched for its number instead."""
    gold = _unmark(text)
    boxed = rf"\boxed{{{gold.rstrip('.')}}}", _ANCHORED
    searched = gold, _PLAIN
    if _PROSE.search(gold):
        readings = [searched]
    elif _BARE_WORD.search(gold) or "$" in gold:
        readings = [searched, boxed]
    else:
        readings = [boxed, searched]
    return next((tuple(found) for reading in readings if gold and (found := _parse(*reading, timeout))), ())


def _unmark(text: str) -> str:
    """The answer that `text` marks, or all of it, without the dollar signs of a formula around it."""
    answer = (marked_answer(text) or text).strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        return answer[1:-1].strip()
    return answer


def _compare_integers(gold: str, answer: str) -> float | None:
    """What math-verify would say of two plain integers, a thousand times faster; None if they aren't that."""
    left, right = _integer(gold), _integer(answer)
    if left is None or right is None:
        return None
    return float(left == right)


def _integer(text: str) -> int | None:
    text = _SPACING.sub(lambda match: "," if match[0] == "{,}" else "", text.replace(r"\$", "").replace("$", ""))
    text = text.strip().rstrip(".")
    if with_unit := _INTEGER_WITH_UNIT.fullmatch(text):
        if _SCALES.search(text):
            return None
        text = with_unit[1]
    return int(text.replace(",", "")) if _INTEGER.fullmatch(text) else None


def _words(gold: str) -> str | None:
    """A verbal answer (`Paris`, a choice `B`), ready to compare; None if it isn't one.

    math-verify reads a word as a product of letters, for which `Paris` equals `pairs`.
    """
    stripped = _strip_text_commands(gold)
    return stripped.casefold() if _WORDS.fullmatch(stripped) else None


def _plain_text(answer: str) -> str:
    return _strip_text_commands(answer).casefold()


def _strip_text_commands(text: str) -> str:
    text = _TEXT_COMMAND.sub(r"\1", text).replace(r"\ ", " ").replace("~", " ").replace("$", "")
    return " ".join(text.split()).strip("().*: ")


def accuracy_reward(completions: list[Any], solution: list[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion's answer equals the solution, else 0.0; None where the solution can't be read.

    TRL's reward of this name; it also reads GSM8K's `#### 72`, takes the last of several boxes, and solutions in
    bare LaTeX. Anything in the completion counts, its reasoning included.
    """
    return [grade(text_of(completion), gold) for completion, gold in zip(completions, solution, strict=True)]


def reasoning_accuracy_reward(
    completions: list[Any], solution: list[Any], reasoning_delimiters: list[str] | None = None, **columns: Any
) -> list[float | None]:
    """`accuracy_reward` on what follows the reasoning; 0.0 where the reasoning was never closed. As in TRL."""
    delimiters = reasoning_delimiters or ["</think>"]
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        closed = any(delimiter in text for delimiter in delimiters)
        rewards.append(grade(final_text(text, delimiters) or "", gold) if closed else 0.0)
    return rewards


@dataclass(frozen=True)
class Accuracy:
    """1 if the final answer equals column `solution` (or `answer`), by math-verify; 0 if not.

    The answer is what the last box, or GSM8K's `####`, or "the answer is $...$" holds, after `</think>` if there is
    one. A completion that never closes its reasoning is wrong. None (missing) where the solution can't be read or
    the comparison timed out.
    """

    plain: bool = False
    """Take an unmarked answer too: the last formula or number of the text."""

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("solution", "answer"),)

    def __call__(
        self,
        completions: list[Any],
        solution: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        golds = solutions_of("accuracy", solution, answer)
        rewards: list[float | None] = []
        for completion, gold in zip(completions, golds, strict=True):
            text = final_text(text_of(completion))
            rewards.append(0.0 if text is None else grade(text, gold, plain=self.plain))
        return rewards
