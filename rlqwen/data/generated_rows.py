"""Generate built-in data: sums of two-digit numbers, for the quickstart and the tests, without a file or the hub."""

import difflib
import random
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from pydantic import Field

from rlqwen.config.base import ArgumentsConfig
from rlqwen.errors import DataError

Row = dict[str, Any]

_EVAL_SHARE = 0.1
# The split must not depend on anything that a recipe sets; otherwise stages would train on eval rows of other stages.
_SPLIT_SEED = 20260101


class ArithmeticArgs(ArgumentsConfig):
    """Hold the arguments of the generator `arithmetic`."""

    kind: Literal["sft", "prompts"] = "prompts"
    """`sft`: rows with `messages`, answered by a teacher that makes mistakes. `prompts`: rows with `prompt`. Both have a
    `solution`."""
    split: Literal["train", "eval"] = "train"
    """The sums a+b and b+a are in the same split; a tenth of the pairs are in `eval`."""
    size: int | None = Field(default=None, gt=0)
    """Number of rows. None: each sum of the split once. More rows repeat the sums in another order, for `train` only."""
    max_digit: int = Field(default=9, ge=1, le=9)
    """Largest digit in the numbers; a smaller one gives fewer sums, which are learned faster."""
    seed: int = 0
    """Seed of the order and of the teacher's mistakes, not of the split."""
    teacher_error: float = Field(default=0.4, ge=0, le=1)
    """Fraction of wrong `sft` answers; the error is -10, -1, 1 or 10, with equal probability."""
    style: Literal["boxed", "think"] = "boxed"
    r"""`boxed`: `\boxed{46}`. `think`: a short calculation in think tags before it."""
    slip_in: Literal["working", "answer"] = "working"
    """Where a mistake of `style: think` begins: in the calculation, or only in the boxed answer."""


def generate(name: str, args: dict[str, Any]) -> list[Row]:
    """Return the rows of the built-in generator `name`.

    Raises DataError for an unknown name and ConfigError for an unknown argument.
    """
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(GENERATORS)}"
        raise DataError(f"there is no generator {name!r}; {hint}")
    return GENERATORS[name](**args)


def arithmetic(**args: Any) -> list[Row]:
    """Generate sums a + b of two numbers from 10 to 99; see ArithmeticArgs.

    Rows: `{"prompt": [{"role": "user", "content": "12 + 34 = ?"}], "solution": "46"}`, or with `messages` in place of
    `prompt` for `kind: sft`. `solution` is always the true sum.
    """
    options = ArithmeticArgs.parse(args, where="generator arithmetic")
    sums = _sums(options.split, options.max_digit)
    size = options.size or len(sums)
    if options.split == "eval" and size > len(sums):
        raise DataError(f"generator arithmetic: size={size}, but split 'eval' has only {len(sums)} sums")
    rng = random.Random(f"arithmetic {options.split} {options.seed}")
    drawn: list[tuple[int, int]] = []
    while len(drawn) < size:
        drawn += rng.sample(sums, len(sums))
    return [_row(a, b, options, rng) for a, b in drawn[:size]]


@cache
def _sums(split: str, max_digit: int) -> tuple[tuple[int, int], ...]:
    numbers = [number for number in range(10, 100) if max(divmod(number, 10)) <= max_digit]
    pairs = [(a, b) for a in numbers for b in numbers if a <= b]
    random.Random(_SPLIT_SEED).shuffle(pairs)
    num_eval = round(_EVAL_SHARE * len(pairs))
    chosen = pairs[:num_eval] if split == "eval" else pairs[num_eval:]
    return tuple(sorted({pair for a, b in chosen for pair in ((a, b), (b, a))}))


def _row(a: int, b: int, options: ArithmeticArgs, rng: random.Random) -> Row:
    question = {"role": "user", "content": f"{a} + {b} = ?"}
    if options.kind == "prompts":
        return {"prompt": [question], "solution": str(a + b)}
    slip = rng.choice((-10, -1, 1, 10)) if rng.random() < options.teacher_error else 0
    answer = f"\\boxed{{{a + b + slip}}}"
    if options.style == "think":
        working = _working(a, b, slip if options.slip_in == "working" else 0)
        answer = f"<think>\n{working}\n</think>\n\n{answer}"
    return {"messages": [question, {"role": "assistant", "content": answer}], "solution": str(a + b)}


def _working(a: int, b: int, slip: int) -> str:
    """Write the sum of the tens plus the sum of the ones, with the result; a mistake appears where it is made."""
    tens = a // 10 * 10 + b // 10 * 10 + (slip if abs(slip) == 10 else 0)
    ones = a % 10 + b % 10 + (slip if abs(slip) == 1 else 0)
    return f"{tens} + {ones} = {tens + ones}"


GENERATORS: dict[str, Callable[..., list[Row]]] = {"arithmetic": arithmetic}
"""Name in a recipe -> function of the arguments."""
