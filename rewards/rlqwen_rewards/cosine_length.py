"""Scale a reward for correctness by length along a cosine (arXiv 2502.03373, appendix C.1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from rlqwen_rewards.accuracy import Accuracy, accuracy_reward
from rlqwen_rewards.answers import solutions_of


@dataclass(frozen=True)
class CosineLength:
    r"""Score correct answers higher if they are short, and wrong ones higher if they are long.

    $R(y) = v_{long} + (v_{short} - v_{long}) (1 + \cos(\pi \min(|y| / L_{max}, 1))) / 2$ with |y| in tokens; the
    two values are those for correct or for wrong answers. None if accuracy is None.
    """

    max_len: int
    """L_max: completions of at least this many tokens get the value for long ones."""
    min_value_wrong: float = -1.0
    """Value of wrong and short completions."""
    max_value_wrong: float = -0.5
    """Value of wrong and long completions."""
    min_value_correct: float = 0.5
    """Value of correct and long completions."""
    max_value_correct: float = 1.0
    """Value of correct and short completions."""

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("solution", "answer"),)

    def __post_init__(self) -> None:
        if self.max_len <= 0:
            raise ValueError(f"max_len: must be above 0 (value given: {self.max_len})")

    def __call__(
        self,
        completions: list[Any],
        completion_ids: list[list[int]],
        solution: list[Any] | None = None,
        answer: list[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        grades = self._grade(completions, solutions_of("cosine_length", solution, answer), columns)
        return [
            None if grade is None else self._scale(grade > 0, len(ids))
            for grade, ids in zip(grades, completion_ids, strict=True)
        ]

    def _grade(self, completions: list[Any], solutions: Any, columns: dict[str, Any]) -> list[float | None]:
        return Accuracy()(completions, solution=solutions, **columns)

    def _scale(self, correct: bool, num_tokens: int) -> float:
        short, long = (
            (self.max_value_correct, self.min_value_correct)
            if correct
            else (self.min_value_wrong, self.max_value_wrong)
        )
        return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * min(num_tokens / self.max_len, 1.0)))


class _CosineScaledReward(CosineLength):
    __name__ = "cosine_scaled_reward"

    def _grade(self, completions: list[Any], solutions: Any, columns: dict[str, Any]) -> list[float | None]:
        return accuracy_reward(completions, solutions)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Construct the reward as TRL's function of this name does; graded by `accuracy_reward`."""
    return _CosineScaledReward(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)
