r"""Reward correct final answers, compared by what they mean; math-verify compares formulas.

The answer of a completion is its last box, the text after GSM8K's `####`, `<answer>...</answer>`, or the formula after
"the answer is". A solution has the same forms, or is the bare answer. Both are converted to one notation, parsed, and
compared by their kind:

- **Numbers** must be equal exactly (1,234 is 1234, 2 2/3 is 8/3, five is 5), or to six decimal places if one is a
  decimal. A number must be computed: neither `19 + 67` nor `\frac{172}{2}` counts for 86, nor `2^{10}` for 1024, but
  `10^6` counts for 1,000,000. An expression that is in the prompt and not in the solution does not count.
- **Units** may be omitted or added. If both have one, they must have the same dimension and are converted: 1 m is
  100 cm, 10 m is not 10 cm. Names of counted things (72 clips) are not compared. A single letter in a solution is a
  unit only in `\text{}`, because `5m` is a product. A duration of several units needs its units.
- **Percent**: 50% equals 50 without the sign, and 0.5; 50 does not equal 0.5.
- **Choices**: if the solution is `B. 12`, both `B` and `12` are correct; if it is `B`, `(B)` and `B. 12` are, and 12
  is not.
- **Several answers** must all be present, in any order; in a tuple, an interval or a matrix, in the same order.
- **Names** may be omitted: 5 for `x = 5`. Every number of a chain `a = b = c` must be correct.
- **Words** must be equal letter by letter, except for case.

| solution | correct | wrong |
|---|---|---|
| `1{,}234` | `1234`, `1,234 km`, `1234.0` | `234`, `1` |
| `2\frac{2}{3}` | `2 2/3`, `8/3`, `2.666667` | `2`, `2/3` |
| `\frac{1}{3}` | `1/3`, `2/6`, `0.333333` | `0.3`, `3` |
| `86` | `86.0`, `x = 86`, `19 + 67 = 86` | `19 + 67`, `172/2`, `1 = 2 = 86` |
| `2^{10}` | `1024`, `2^{10}` | `2`, `10`, `20` |
| `1024` | `1024`, `1.024e3` | `2^{10}`, `4 \times 256` |
| `50%` | `50\%`, `0.5`, `\frac{1}{2}`, `50` | `5000`, `0.5\%` |
| `0.5` | `50\%`, `1/2`, `.5` | `50` |
| `10 cm` | `10`, `10\text{ cm}`, `100 mm`, `0.1 m` | `10 m`, `0.1`, `10 kg` |
| `72 clips` | `72`, `72 paper clips`, `72\text{ clips}` | `27 clips` |
| `2 hours 30 minutes` | `150 minutes`, `2.5 h`, `2小时30分` | `2`, `30`, `2.5`, `150` |
| `B` | `(B)`, `B.`, `\text{B}`, `B. 12` | `A`, `12`, `A, B` |
| `B. 12` | `B`, `(B)`, `12`, `(B) 12` | `C`, `C. 12`, `B. 13` |
| `(1, 2)` | `(1,2)`, `\left(1,2\right)` | `(2, 1)`, `1`, `2` |
| `1, 2` | `2, 1`, `1 或 2`, `\{1, 2\}`, `x = 1 or x = 2` | `1`, `2`, `1, 2, 3` |
| `x > 3` | `(3, \infty)`, `3 < x` | `3`, `x < 3` |
| `March 5, 2020` | `5 March 2020`, `2020-03-05`, `2020年3月5日` | `5`, `2020`, `March` |
| `２元` | `2元`, `2`, `¥2` | `2角` |
| `是` | `\text{是}` | `否` |
"""

import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from rlqwen_rewards.answers import (
    boxed_answer,
    boxes,
    final_text,
    given_solutions,
    hashed_answer,
    join,
    marked_answer,
    solutions_of,
    stated_answer,
    text_of,
    texts_of,
    unmarked_answer,
)
from rlqwen_rewards.comparison import is_meaningful, same
from rlqwen_rewards.notation import canonical, contains, squeeze
from rlqwen_rewards.numerals import read_number

_TIMEOUT = 3  # seconds per comparison, which usually takes milliseconds
_LONGEST_ANSWER = 1000

_INTEGER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,15})\.?")
_NUMBER_FIRST = re.compile(r"[-+$\\({ ]*\d")
_ANSWER_IS = re.compile(r"(?:answer|solution)(?: is|:)\s*(?!not\b)(\S.*)|答案?[是为:：]\s*(\S.*)", re.IGNORECASE)
_INLINE = re.compile(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)")
_OPERATION = re.compile(
    r"(?<=[\w)}\]!|])\s*[-+*/^=]|!|\\(?:times|cdot|div|frac|sqrt|binom|int|sum|prod|lim|log|ln|sin|cos|tan)(?![A-Za-z])|[\w)]\("
)


def grade(text: str, solution: Any, *, plain: bool = False, prompt: Any = None) -> float | None:
    """Return 1.0 if the answer in `text` equals the solution, 0.0 if it does not or if there is no answer.

    None if the solution itself cannot be parsed. A comparison that runs out of time gives 0.0, because only a formula
    made for that purpose takes so long. With `plain`, an unmarked answer counts, too: the text after "the answer is",
    else the last formula or number. An answer of over 1,000 characters counts as none. A solution may be a list, any
    entry of which is accepted.
    """
    if isinstance(solution, str):
        return _grade(text, solution, plain, prompt)
    grades = [_grade(text, str(one), plain, prompt) for one in given_solutions(solution)]
    return max((one for one in grades if one is not None), default=None)


def _grade(text: str, solution: str, plain: bool, prompt: Any) -> float | None:
    gold = _gold(solution)
    if gold is None:
        return None
    answer = _answer(text, plain)
    if answer is None or len(answer) > max(_LONGEST_ANSWER, 2 * len(gold.text)):
        return 0.0 if gold.is_readable else None
    quick = _compare_integers(gold, answer)
    if quick is not None:
        return quick
    said = canonical(_unmark(answer))
    if squeeze(said) == gold.key:
        return 1.0
    if not gold.is_readable:
        return None
    return float(_within_time(partial(same, gold.text, said)) and not _is_in_prompt(said, prompt))


def _answer(text: str, plain: bool) -> str | None:
    """Return the answer that a completion gives; a box and a `####` after it must agree."""
    boxed = boxed_answer(text)
    if boxed and "####" in text:
        hashed = hashed_answer(text[boxes(text)[-1][1] :])
        if hashed and _NUMBER_FIRST.match(hashed):  # otherwise `####` begins a heading
            return join((boxed, hashed))
        return boxed
    return boxed or marked_answer(text) or stated_answer(text) or (unmarked_answer(text) if plain else None)


@dataclass(frozen=True)
class _Gold:
    """Hold a solution in the form that is compared."""

    text: str
    key: str
    integer: int | None
    is_readable: bool


@lru_cache(maxsize=8192)
def _gold(solution: str) -> _Gold | None:
    """Return the solution in the form that is compared; None if it is empty."""
    text = canonical(_unmark(solution)) if given_solutions(solution) else ""
    if not text:
        return None
    key, found = squeeze(text), text
    is_readable = _within_time(partial(is_meaningful, text))
    if not is_readable and (in_sentence := _find_in_sentence(solution)):
        found, is_readable = in_sentence, True
    return _Gold(found, key, _integer(found), is_readable)


def _find_in_sentence(solution: str) -> str | None:
    """Return the answer in a sentence: the text after "the answer is", or the only formula."""
    stated = _ANSWER_IS.search(solution)
    formulas = _INLINE.findall(solution)
    found = next(filter(None, stated.groups()), "") if stated else "".join(formulas[0]) if len(formulas) == 1 else ""
    text = canonical(found)
    return text if text and _within_time(partial(is_meaningful, text)) else None


def _within_time(check: Callable[[], bool]) -> bool:
    """Run a check; return False if it takes too long.

    The timeout needs the main thread, which receives signals; elsewhere the caller's deadline applies.
    """
    seconds = _TIMEOUT if threading.current_thread() is threading.main_thread() else None

    def repeatedly_timed() -> bool:
        # Python ignores an exception raised in a destructor, which would lose a single alarm, so repeat it.
        if seconds and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        return check()

    try:
        return bool(timeout(seconds)(repeatedly_timed)())
    except (TimeoutException, RecursionError, MemoryError):
        return False


def _unmark(text: str) -> str:
    return marked_answer(text) or text


def _compare_integers(gold: _Gold, answer: str) -> float | None:
    """Grade two plain integers by a fast path; None if either is not a plain integer."""
    integer = _integer(answer) if gold.integer is not None else None
    return None if integer is None else float(gold.integer == integer)


def _integer(text: str) -> int | None:
    """Read a plain integer by a fast path; None if the text is not one."""
    return int(text.rstrip(".").replace(",", "")) if _INTEGER.fullmatch(text) else None


def _is_in_prompt(answer: str, prompt: Any) -> bool:
    """Return whether the answer is an expression that the prompt asks to evaluate or to rewrite."""
    if prompt is None or not _OPERATION.search(answer):
        return False
    number = read_number(answer)
    if number is not None and number.form != "power" and number.is_reduced:
        return False
    asked = prompt if isinstance(prompt, str) else text_of([turn for turn in prompt if turn.get("role") == "user"])
    return contains(canonical(asked), answer.rpartition("=")[2].strip())


def accuracy_reward(completions: list[Any], solution: list[Any], **columns: Any) -> list[float | None]:
    """Score 1.0 if the completion's answer equals the solution, else 0.0; None if the solution cannot be parsed.

    TRL's reward of this name. It also accepts GSM8K's `#### 72`, the last of several boxes, and solutions in bare LaTeX.
    The whole completion is searched, including its reasoning.
    """
    return [grade(text_of(completion), gold) for completion, gold in zip(completions, solution, strict=True)]


def reasoning_accuracy_reward(
    completions: list[Any], solution: list[Any], reasoning_delimiters: list[str] | None = None, **columns: Any
) -> list[float | None]:
    """Score by `accuracy_reward` the text after the reasoning; 0.0 if the reasoning was never closed, as in TRL."""
    delimiters = reasoning_delimiters or ["</think>"]
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        closed = any(delimiter in text for delimiter in delimiters)
        rewards.append(grade(final_text(text, delimiters) or "", gold) if closed else 0.0)
    return rewards


@dataclass(frozen=True)
class Accuracy:
    """Score 1 if the final answer equals column `solution` (or `answer`), by math-verify; 0 if not.

    The answer is the content of the last box, of GSM8K's `####`, of `<answer>...</answer>`, or of "the answer is $...$",
    after `</think>` if there is one. Several answers instead of one are wrong, and so is an expression that the prompt
    asks to compute. A completion that never closes its reasoning, or opens it again after its answer, is wrong. None
    (missing) if there is no solution or it cannot be parsed. The module's docstring defines equality.
    """

    plain: bool = False
    """Whether an unmarked answer counts: the text after "the answer is", else the last formula or number."""

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("solution", "answer"),)

    def __call__(
        self,
        completions: list[Any],
        solution: Sequence[Any] | None = None,
        answer: Sequence[Any] | None = None,
        prompts: Sequence[Any] | None = None,
        prompt_opens_reasoning: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        golds = solutions_of("accuracy", solution, answer)
        rewards: list[float | None] = []
        for i, (text, gold) in enumerate(
            zip(texts_of(completions, prompts, prompt_opens_reasoning), golds, strict=True)
        ):
            prompt = prompts[i] if prompts is not None else None
            rewards.append(grade(final_text(text) or "", gold, plain=self.plain, prompt=prompt))
        return rewards
